#!/bin/sh
# transformers 5.24.0, gguf 0.19.0: a tokenizer that is read from a GGUF file has a token more than the file.
#
# A GGUF file lists all tokens of a model. One would guess that AutoTokenizer.from_pretrained(gguf_file=...)
# has these. Where a byte-level BPE vocabulary has no <|endoftext|> (that of Llama 3 has none), transformers adds
# it, with the first id that the embedding does not have: a text with these letters ends in an IndexError of
# the embedding, and a check that every token has an embedding fails.
#
# Seen: 30 tokens in the file, 31 in the tokenizer, "<|endoftext|>" has id 30, "a<|endoftext|>" is [0, 30].
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.24.0 gguf==0.19.0
cd "$folder"
cat > check.py <<'PYTHON'
import gguf
from transformers import AutoTokenizer

words = [*"abcdefghijklmnopqrstuvwxyz", "Ġ", "Ċ", "ab", "</s>"]
writer = gguf.GGUFWriter("tiny.gguf", "llama")
for add, value in (
    (writer.add_block_count, 1), (writer.add_context_length, 64), (writer.add_embedding_length, 64),
    (writer.add_feed_forward_length, 64), (writer.add_head_count, 4), (writer.add_head_count_kv, 4),
    (writer.add_layer_norm_rms_eps, 1e-6), (writer.add_vocab_size, len(words)),
    (writer.add_tokenizer_model, "gpt2"), (writer.add_token_list, words),
    (writer.add_token_types, [1] * len(words)), (writer.add_token_merges, ["a b"]),
    (writer.add_eos_token_id, len(words) - 1),
):
    add(value)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

tokenizer = AutoTokenizer.from_pretrained(".", gguf_file="tiny.gguf")
print(f"{len(words)} tokens in the file, {len(tokenizer)} in the tokenizer")
print(tokenizer("a<|endoftext|>").input_ids)
assert len(tokenizer) == len(words) + 1
assert tokenizer.get_vocab()["<|endoftext|>"] == len(words)
assert tokenizer("a<|endoftext|>").input_ids == [0, len(words)]
PYTHON
"$folder/venv/bin/python" check.py
