#!/bin/sh
# peft 0.21.2, reduce_intruder_dimension (takes from a LoRA adapter the directions that the model did not have, against forgetting).
# One would guess, from its docstring ("the higher the value the more of the intruder dimension is subtracted"): with
# mitigation_lambda=0 the adapter stays as it was, with 1 the directions are gone.
# Seen: the other way round. 1 gives back the adapter to the last digits of float32, 0 takes the whole directions, and the default 0.75
# takes a quarter.
# Why it matters: who raises it to get back more of what an adapter has damaged gets less, and at 1 nothing.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$folder"
cat > reduce.py <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension


def changed(share):
    """How far the reduced adapter is from the one that was given, as a share of that."""
    torch.manual_seed(0)
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(48, 48, bias=False)), LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
    )
    layer = model.base_model.model[0]
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.5)
    given = layer.get_delta_weight("default")
    reduce_intruder_dimension(model, mitigation_lambda=share, logging_sink=None)
    reduced = layer.get_delta_weight("intruder_reduced")
    return ((reduced - given).norm() / given.norm()).item()


changes = {share: changed(share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)}
for share, change in changes.items():
    print(f"mitigation_lambda={share}: {change:.3f} of the adapter is changed")
assert list(changes.values()) == sorted(changes.values(), reverse=True)
assert changes[1.0] < 1e-5 < 0.5 < changes[0.0]
PY
venv/bin/python reduce.py
