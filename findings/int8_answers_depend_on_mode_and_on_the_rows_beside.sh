#!/bin/sh
# bitsandbytes 0.50.2 with transformers 5.23.0 (load_in_8bit=True) on a CPU.
# One would guess: a model without dropout gives the same logits in train() and in eval(), and a row of a
# batch the same as the row alone, but for rounding.
# Seen: (1) in eval mode the inputs of every linear layer are rounded to int8, in train mode they are
# not: logits of a tiny Llama differ by 6 % of their size, while a float32 model's are equal to
# the bit. So the loss that training reports is not the loss that an evaluation finds.
# (2) columns of the inputs that exceed llm_int8_threshold (6.0 by default) anywhere in the batch are
# left out of the rounding for all rows, so one row's output changes by what stands in another.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 bitsandbytes==0.50.2
cat > "$folder/run.py" <<'PY'
import logging, sys
import torch, transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

logging.disable(logging.WARNING)
transformers.logging.set_verbosity_error()
folder = sys.argv[1] + "/model"
torch.manual_seed(0)
shape = dict(vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
ids = torch.arange(20)[None]


@torch.no_grad()
def modes(model):
    one, other = model.eval()(ids).logits, model.train()(ids).logits
    return ((one - other).abs().max() / one.abs().max()).item()


plain = modes(AutoModelForCausalLM.from_pretrained(folder))
model = AutoModelForCausalLM.from_pretrained(
    folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
)
int8 = modes(model)
print(f"train() against eval(): float32 {plain:.1e}, int8 {int8:.1e} of the largest logit")

layer = model.eval().model.layers[0].mlp.up_proj
row, beside = torch.randn(1, 64), torch.randn(1, 64)
beside[0, :8] = 20.0  # outliers, as large models have them
with torch.no_grad():
    alone, together = layer(row)[0], layer(torch.cat([row, beside]))[0]
    calm = layer(torch.cat([row, torch.randn(1, 64)]))[0]
change = ((alone - together).abs().max() / alone.abs().max()).item()
print(f"a row beside one with outliers: changes by {change:.1e} of its size; beside another: "
      f"{(alone - calm).abs().max().item():.1e}")
assert plain == 0 and int8 > 1e-3
assert change > 1e-4 and torch.allclose(alone, calm, atol=1e-6)
PY
"$folder/venv/bin/python" "$folder/run.py" "$folder"
