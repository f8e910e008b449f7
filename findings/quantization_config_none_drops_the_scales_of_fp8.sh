#!/bin/sh
# transformers 5.23.0: AutoModelForCausalLM.from_pretrained(FOLDER, quantization_config=None), with the
# documented default written out, reads an fp8 checkpoint without its scales; the same call of the
# model's own class, and the call that leaves the argument out, dequantise it.
# One would guess: an argument that is passed as its default changes nothing.
# Seen: largest weight .809 (argument left out), .809 (LlamaForCausalLM, None), 448 (Auto class, None);
# logits differ by 113 % of their size. Why: the Auto class hands what it was given to the config, so
# that config.quantization_config becomes None, and the scales are "unexpected" keys.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cat > "$folder/run.py" <<'PY'
import json, sys
import torch, transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
folder = sys.argv[1] + "/model"
torch.manual_seed(0)
shape = dict(vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16).save_pretrained(folder)
weights = load_file(folder + "/model.safetensors")
for name in [name for name in weights if "_proj" in name]:
    scale = weights[name].float().abs().max() / 448
    weights[name] = (weights[name].float() / scale).to(torch.float8_e4m3fn)
    weights[name + "_scale_inv"] = scale.reshape(1, 1)
save_file(weights, folder + "/model.safetensors", metadata={"format": "pt"})
config = json.load(open(folder + "/config.json"))
config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic",
                                 "weight_block_size": [128, 128], "fmt": "e4m3"}
json.dump(config, open(folder + "/config.json", "w"))

ids = torch.arange(20)[None]
found = {}
for what, model in {
    "left out": AutoModelForCausalLM.from_pretrained(folder),
    "LlamaForCausalLM, None": LlamaForCausalLM.from_pretrained(folder, quantization_config=None),
    "AutoModelForCausalLM, None": AutoModelForCausalLM.from_pretrained(folder, quantization_config=None),
}.items():
    largest = model.model.layers[0].mlp.down_proj.weight.abs().max().item()
    found[what] = largest, model(ids).logits.float().detach()
    print(f"{what:28} largest weight {largest:.3f}")
right, same, wrong = found.values()
difference = (wrong[1] - right[1]).abs().max() / right[1].abs().max()
print(f"logits differ by {difference:.0%} of their size")
assert right[0] == same[0] < 1 and torch.equal(right[1], same[1])
assert wrong[0] == 448 and difference > 0.5
PY
"$folder/venv/bin/python" "$folder/run.py" "$folder"
