#!/bin/sh
# transformers 5.24.0: a message's key `reasoning` (or `thinking`) reaches chat templates that read
# only `reasoning_content`.
# One would guess: a template sees the messages as they are, so a key that it does not read makes
# no difference.
# Seen: apply_chat_template copies `reasoning` and `thinking` to `reasoning_content`, so the note
# that a data set keeps beside its answers is trained on as a thought: 'A<think>HINT</think>yes'.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/check.py" <<'PY'
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

raw = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
tokenizer.chat_template = (
    "{% for m in messages %}{{ m.role[0] | upper }}"
    "{% if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% endfor %}"
)
found = {}
for key in ("reasoning_content", "reasoning", "thinking", "note"):
    turns = [{"role": "assistant", "content": "yes", key: "HINT"}]
    found[key] = tokenizer.apply_chat_template(turns, tokenize=False)
print(found)
thought, plain = "A<think>HINT</think>yes", "Ayes"
assert found["reasoning_content"] == thought and found["note"] == plain
assert found["reasoning"] == found["thinking"] == thought
PY
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "transformers==5.24.0" "jinja2==3.1.6"
"$folder/venv/bin/python" "$folder/check.py"
