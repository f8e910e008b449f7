#!/bin/sh
# optimum-quanto 0.2.7 with peft 0.21.2: LoRA on linear layers that quanto has quantised and frozen (qint8, qint4).
# One would guess: peft trains such an adapter, and merging it either raises or gives rounded sums of both.
# Seen: a QLinear is an nn.Linear, so peft takes it for a plain one. The adapter trains and changes the logits;
# merge_adapter() and merge_and_unload() run without a warning and change nothing: peft assigns the sum to
# weight.data, a quantised tensor keeps its data elsewhere, and the layers go on computing with the old one. The
# merged model is the base model to the last bit, and the adapter is gone.
# Why it matters: what was fine-tuned, or unlearned, is lost on the way to where it is served, and nothing says so.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2 optimum-quanto==0.2.7
cat > "$folder/run.py" <<'PY'
import warnings

import torch
from optimum.quanto import freeze, qint4, qint8, quantize
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.arange(1, 40)[None]
shape = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}
settings = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@torch.no_grad()
def logits(model):
    return model(ids).logits


for form in (qint8, qint4):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    quantize(model, weights=form, exclude="lm_head")
    freeze(model)
    base = logits(model)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    adapted(input_ids=ids, labels=ids).loss.backward()
    learns = all(w.grad is not None for n, w in adapted.named_parameters() if "lora_" in n)
    with_adapter = logits(adapted.eval())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        merged = logits(adapted.merge_and_unload())
    about = [str(w.message) for w in told if "merge" in str(w.message).lower()]
    effect, left = (with_adapter - base).norm().item(), (merged - base).norm().item()
    print(f"{form}: trains {learns}, effect of the adapter {effect:.2f}, after merging {left:.2f}, warnings {about}")
    assert learns and effect > 1 and left == 0 and not about
PY
"$folder/venv/bin/python" "$folder/run.py" 2>/dev/null
