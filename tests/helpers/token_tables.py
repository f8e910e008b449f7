"""Tokens as words, so that a test shows which of them are read and which are scored."""

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import PreTrainedTokenizerFast

from unlora.forward import IGNORE_INDEX

TEXT = (
    "Who wrote it ? Ana Silva . You are a helpful assistant user model system Question Answer "
    "Today 10 Apr 2025 A AAAAAAAA : [ INST / ] AI named SmolLM , trained by Hugging Face "
    "think no_think final When Äh"
)


def words(begin, end, pad, special=()) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word or sign."""
    known = ["<unk>", " ", "\n", *dict.fromkeys(TEXT.split())]
    vocabulary = {word: i for i, word in enumerate(known)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s|\w+|[^\w\s]"), "isolated")
    raw.decoder = Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=begin, eos_token=end, pad_token=pad, unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    return fast


def table(tokenizer, row):
    """One line for each token: is it attended, is it scored, what is it."""
    lines = []
    for token, label in zip(row.input_ids, row.labels, strict=True):
        assert label in (IGNORE_INDEX, token)
        scored = "scored" if label != IGNORE_INDEX else ""
        lines.append(f"attended  {scored:6}  {tokenizer.decode([token])!r}".rstrip())
    return "\n".join(lines)
