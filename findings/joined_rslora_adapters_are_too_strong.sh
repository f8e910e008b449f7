#!/bin/sh
# peft 0.21.2: add_weighted_adapter(combination_type="cat" or "svd") on adapters with use_rslora=True.
# One would guess: "cat" adds what the adapters add, exactly, as it does without use_rslora.
# Seen: the joined adapter adds sqrt(its rank) times as much. Each adapter's scale goes into its
# weights, and the new adapter gets lora_alpha = r, which is a scale of 1 for plain LoRA; but it keeps
# use_rslora, whose scale is alpha / sqrt(r) = sqrt(r). Two adapters of rank 4 are joined to one that
# is 2.83 times too strong; one adapter of rank 4, weighted by 0.5, is as strong as before.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/check.py" <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from torch import nn


def strengths(use_rslora, kind):
    """Size of the joined adapter over that of the sum; of a halved one over what it is half of."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], use_rslora=use_rslora)
    model = get_peft_model(nn.Sequential(nn.Linear(16, 16)), config, adapter_name="first")
    model.add_adapter("second", config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight)
    options = [{"svd_rank": rank} if kind == "svd" else {} for rank in (8, 4)]
    model.add_weighted_adapter(
        ["first", "second"], [1.0, 1.0], "joined", combination_type=kind, **options[0]
    )
    model.add_weighted_adapter(["first"], [0.5], "halved", combination_type=kind, **options[1])
    layer = model.base_model.model[0]
    first, second, joined, half = (
        layer.get_delta_weight(name) for name in ("first", "second", "joined", "halved")
    )
    direction = torch.cosine_similarity(joined.flatten(), (first + second).flatten(), dim=0)
    assert direction > 0.9999, direction
    return [float(joined.norm() / (first + second).norm()), float(half.norm() / first.norm())]


for kind in ("cat", "svd"):
    plain, rslora = strengths(False, kind), strengths(True, kind)
    print(kind, "plain", [f"{s:.3f}" for s in plain], "rsLoRA", [f"{s:.3f}" for s in rslora])
    torch.testing.assert_close(plain, [1.0, 0.5], rtol=1e-4, atol=0)
    torch.testing.assert_close(rslora, [8**0.5, 0.5 * 4**0.5], rtol=1e-4, atol=0)
PY
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0
"$folder/venv/bin/python" -m pip install --quiet peft==0.21.2 transformers==5.24.0 accelerate==1.15.0
"$folder/venv/bin/python" "$folder/check.py"
