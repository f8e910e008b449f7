#!/bin/sh
# onnxruntime-genai 0.18.0 (onnxruntime 1.32.0), its model builder with --extra_options adapter_path=FOLDER, peft 0.21.2.
# One would guess: the builder goes through peft's layers, so that what it cannot write is refused.
# Seen: LoRA is written exactly (rsLoRA, rank_pattern, alpha_pattern and modules_to_save, too). Of DoRA the magnitudes are left out,
# and of lora_bias=True the biases, without a word: another model is served, and the builder ends with 0. With an adapter on lm_head
# the builder ends with 0 as well, and its own loader refuses the file ("Invalid model").
# Why it matters: who trains with use_dora, or with lm_head among the target modules, has to merge before this export.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2 onnx==1.23.2 onnx-ir==1.1.0 \
  onnxruntime==1.32.0 onnxruntime-genai==0.18.0
cd "$folder"
cat > compare.py <<'PY'
import subprocess
import sys

import numpy as np
import onnxruntime_genai as genai
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PROMPT = [10, 30, 50, 70, 90, 110]
ADAPTERS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 8}},
    "saved head": {"modules_to_save": ["lm_head"]},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "adapted head": {"target_modules": ["q_proj", "lm_head"]},
}


def make_root():
    letters = pre_tokenizers.ByteLevel.alphabet()
    words = {"<s>": 0, "</s>": 1} | {letter: n for n, letter in enumerate(sorted(letters), start=2)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained("root")
    torch.manual_seed(0)
    root = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    ))
    for weight in root.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)
    root.save_pretrained("root")


def make_adapter(name, settings):
    torch.manual_seed(1)
    given = {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj", "down_proj"], **settings}
    model = get_peft_model(LlamaForCausalLM.from_pretrained("root"), LoraConfig(task_type="CAUSAL_LM", **given))
    for key, weight in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(weight, std=0.05)
        if "magnitude" in key:
            weight.data *= 1.3
    model.save_pretrained(name)


def by_peft(name):
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("root"), name)
    return model(input_ids=torch.tensor([PROMPT])).logits[0, -1].detach()


def by_genai(name):
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", "root", "-o", f"{name} as onnx"]
    subprocess.run([*builder, "-p", "fp32", "-e", "cpu", "--extra_options", f"adapter_path={name}"],
                   check=True, capture_output=True)
    model = genai.Model(f"{name} as onnx")
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=20)
    generator = genai.Generator(model, options)
    generator.append_tokens(np.array([PROMPT], dtype=np.int32))
    return torch.tensor(np.array(generator.get_logits())[0, -1])


make_root()
for name, settings in ADAPTERS.items():
    make_adapter(name, settings)
    try:
        difference = (by_genai(name) - by_peft(name)).abs().max().item()
    except RuntimeError as error:
        print(f"{name}: {str(error).partition('failed:')[2][:14]}")
        assert name == "adapted head" and "Invalid model" in str(error)
        continue
    print(f"{name}: logits differ by {difference:.4f}")
    assert (difference < 1e-3) == (name not in ("dora", "lora_bias")) and name != "adapted head"
PY
OMP_NUM_THREADS=1 venv/bin/python compare.py 2>/dev/null
