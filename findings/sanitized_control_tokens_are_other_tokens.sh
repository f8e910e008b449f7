#!/bin/sh
# transformers 5.24.0: apply_chat_template(sanitize_control_tokens=True) encodes control tokens in a
# user's text "as ordinary text".
# One would guess: the user's text becomes the tokens that it has as ordinary text, those of
# tokenizer(text, split_special_tokens=True).
# Seen: the control token is encoded apart from what stands around it, so merges across its borders
# are lost: ' <' (one token of the plain text) becomes ' ', '<'. A model reads another sequence than
# for the same words in any other text.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/check.py" <<'PY'
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
vocabulary = {token: i for i, token in enumerate([*alphabet, "Ġ<"])}
raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "<")]))
raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
raw.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")
tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
text = "a <|end|>"
plain = tokenizer(text, split_special_tokens=True).input_ids
turns = [{"role": "user", "content": text}]
clean = tokenizer.apply_chat_template(turns, sanitize_control_tokens=True, return_dict=False)
print("plain text:", tokenizer.convert_ids_to_tokens(plain))
print("sanitized: ", tokenizer.convert_ids_to_tokens(clean))
assert tokenizer.eos_token_id not in plain and tokenizer.eos_token_id not in clean
assert tokenizer.decode(plain) == tokenizer.decode(clean) == text
assert "Ġ<" in tokenizer.convert_ids_to_tokens(plain)
assert clean != plain and len(clean) == len(plain) + 1
PY
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "transformers==5.24.0" "jinja2==3.1.6"
"$folder/venv/bin/python" "$folder/check.py"
