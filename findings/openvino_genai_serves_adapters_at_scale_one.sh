#!/bin/sh
# openvino-genai 2026.4.1.0 (openvino 2026.4.1, export by optimum-intel 2.2.0), peft 0.21.2: at which strength an adapter folder of
# peft is served by openvino_genai.Adapter.
# One would guess: lora_alpha / r, which stands in the adapter_config.json beside the weights, or a refusal.
# Seen: the file of weights is all that is read, and the strength is 1 whatever the config says, without a word. r=8 with
# lora_alpha=32 (4 in peft) writes the texts of peft at strength 1; use_rslora and alpha_pattern have no part in it either.
# AdapterConfig([(adapter, 4.0)]) gives peft's texts, and so does an adapter whose lora_alpha is its rank.
# Why it matters: an adapter with lora_alpha = 2 r (a common choice) is served at half of its strength, and one that was dialled down
# by its lora_alpha at all of it. The scale belongs into B before such an adapter is served.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.5.4 peft==0.21.2 openvino==2026.4.1 \
  openvino-tokenizers==2026.4.1.0 openvino-genai==2026.4.1.0 nncf==3.4.0 optimum==2.3.0 optimum-intel==2.2.0
"$folder/venv/bin/python" -m pip uninstall --quiet --yes torchvision  # one of another build of torch stops transformers; not needed
cd "$folder"
cat > make.py <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ADAPTERS = {
    "strength_4": {"r": 8, "lora_alpha": 32},
    "rslora_4": {"r": 16, "lora_alpha": 16, "use_rslora": True},
    "pattern": {"r": 8, "lora_alpha": 8, "alpha_pattern": {"v_proj": 64}},
    "strength_1": {"r": 8, "lora_alpha": 8},
}
letters = pre_tokenizers.ByteLevel.alphabet()
words = {"<s>": 0, "</s>": 1} | {letter: number for number, letter in enumerate(sorted(letters), start=2)}
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
for name, settings in ADAPTERS.items():
    model = LlamaForCausalLM.from_pretrained("root")
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], **settings))
    for key, weight in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(weight, std=0.05)
    model.save_pretrained(name)
PY
cat > ask.py <<'PY'
import numpy as np
import openvino
import openvino_genai as genai
from peft import PeftModel
from transformers import LlamaForCausalLM
import torch

PROMPT = [10, 30, 50, 70, 90, 110]


def by_peft(name, strength=None):
    model = LlamaForCausalLM.from_pretrained("root")
    if name:
        model = PeftModel.from_pretrained(model, name)
    for layer in model.modules():
        if strength is not None and isinstance(getattr(layer, "scaling", None), dict):
            layer.scaling["default"] = strength
    ids = model.generate(input_ids=torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False, eos_token_id=None)
    return ids[0, len(PROMPT):].tolist()


def by_openvino(name, strength=None):
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "ATTENTION_BACKEND": "SDPA"}
    if name:
        adapter = genai.Adapter(f"{name}/adapter_model.safetensors")
        config = genai.AdapterConfig(adapter) if strength is None else genai.AdapterConfig([(adapter, strength)])
        exact["adapters"] = config
    settings = genai.GenerationConfig()
    settings.max_new_tokens, settings.ignore_eos = 24, True
    pipe = genai.LLMPipeline("exported", "CPU", **exact)
    return list(pipe.generate(openvino.Tensor(np.array([PROMPT])), settings).tokens[0])


assert by_openvino(None) == by_peft(None), "the root itself is answered as transformers does"
for name in ("strength_4", "rslora_4", "pattern", "strength_1"):
    served, peft, one = by_openvino(name), by_peft(name), by_peft(name, 1)
    print(f"{name}: as peft {served == peft}, as peft at strength 1 {served == one}")
    assert served == one and (served == peft) == (name == "strength_1")
for name in ("strength_4", "rslora_4"):
    told = by_openvino(name, 4.0) == by_peft(name)
    print(f"{name}, told 4.0: as peft {told}")
    assert told
PY
venv/bin/python make.py
venv/bin/optimum-cli export openvino --model root --weight-format fp32 --task text-generation-with-past exported >export.log 2>&1 || {
  cat export.log
  exit 1
}
venv/bin/python ask.py
