#!/bin/sh
# peft 0.21.2 with transformers 5.23.0: LoRA on the experts of a Mixtral (target_modules="all-linear").
# One would guess: a warning that keys of a rank_pattern "were ignored" is true, and is about keys that
# the user gave.
# Seen: no pattern is given; peft turns the experts into target_parameters and writes a rank_pattern and an
# alpha_pattern for the fused gate_up_proj itself, warns that both "did not match any targeted module and
# were ignored", and uses them: the fused parameter has twice the rank of the others.
# Why it matters: who believes the warning and takes the keys out of adapter_config.json cannot load
# the adapter any more, as its tensors have the rank of the pattern.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 peft==0.21.2
cat > "$folder/run.py" <<'PY'
import json, sys, warnings
from pathlib import Path
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

transformers.utils.logging.set_verbosity_error()
shape = MixtralConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                      num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    given = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    assert not given.rank_pattern
    model = get_peft_model(MixtralForCausalLM(shape), given)
said = [str(one.message) for one in said if "rank_pattern" in str(one.message)]
ranks = {name.rpartition(".lora_A")[0].rpartition("layers.")[2]: min(weight.shape)
         for name, weight in model.named_parameters() if ".lora_A" in name}
print("warned:", said[0])
print("written by peft:", dict(model.peft_config["default"].rank_pattern))
print("tensors:", {name: tuple(w.shape) for name, w in model.named_parameters() if "experts" in name and ".lora_A" in name})
assert len(said) == 1 and "were ignored" in said[0]
assert model.peft_config["default"].rank_pattern == {r".*\.gate_up_proj": 8}
shapes = {tuple(w.shape)[0] for n, w in model.named_parameters() if "experts" in n and ".lora_A" in n}
assert shapes == {4 * 4, 4 * 8}, shapes  # experts x rank

folder = Path(sys.argv[1], "adapter")
model.save_pretrained(str(folder))
settings = folder / "adapter_config.json"
content = json.loads(settings.read_text())
settings.write_text(json.dumps(content | {"rank_pattern": {}, "alpha_pattern": {}}))
warnings.simplefilter("ignore")
try:
    PeftModel.from_pretrained(MixtralForCausalLM(shape), str(folder))
except RuntimeError as error:
    print("without what was 'ignored':", str(error).splitlines()[1].strip()[:120])
else:
    raise SystemExit("it loads without the patterns now")
PY
"$folder/venv/bin/python" "$folder/run.py" "$folder"
