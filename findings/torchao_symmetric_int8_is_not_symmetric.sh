#!/bin/sh
# torchao 0.18.0: Int8WeightOnlyConfig, "symmetric" weights of 8 bits with one scale for each output channel.
# One would guess: the largest weight of a channel is +-127 steps, so it stays as it is; -W becomes minus
# what W becomes; and weights that were rounded once stay as they are when they are rounded again.
# Seen: a step is absmax / 127.5. The largest weight of a channel shrinks by 0.39 % (127 / 127.5) where it is
# positive; where it is negative it lies between two steps, and shrinks or grows by as much (128 / 127.5), as
# the last bit of the division falls; so -W and W are rounded to other sizes; and a second rounding moves
# nearly all weights again, as absmax has changed.
# Why it matters: a model that is dequantised and quantised again at every export drifts, and figures of one
# rounding are not those of two.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 torchao==0.18.0
cat > "$folder/run.py" <<'PY'
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_


def rounded(weight):
    layer = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    with torch.no_grad():
        layer[0].weight.copy_(weight)
    quantize_(layer, Int8WeightOnlyConfig())
    return layer[0].weight.dequantize()


torch.manual_seed(0)
weight = torch.randn(64, 256)
once = rounded(weight)
rows, largest = torch.arange(64), weight.abs().argmax(1)
share = once[rows, largest] / weight[rows, largest]
positive = weight[rows, largest] > 0
sizes = {sign: sorted(set((share[where] * 127.5).round().tolist()))
         for sign, where in (("positive", positive), ("negative", ~positive))}
print("steps of the largest weight of a channel, of 127.5:", sizes)
assert sizes == {"positive": [127.0], "negative": [127.0, 128.0]}

mirrored = -rounded(-weight)
apart = (mirrored - once).abs().max().item()
print("largest difference between W and -W, rounded:", apart)
assert apart > 1e-3

moved = (rounded(once) != once).float().mean().item()
print("share of the rounded weights that a second rounding moves:", moved)
assert moved > 0.9
PY
"$folder/venv/bin/python" "$folder/run.py" 2>/dev/null
