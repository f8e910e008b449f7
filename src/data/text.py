"""Running text as training rows."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from unlora.data.chat import Encoded
from unlora.errors import InputError


def chunks(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, max_length: int
) -> list[Encoded]:
    """All texts, joined by empty lines, cut into rows of ``max_length`` tokens.

    The text is tokenised once and the ids are cut, never decoded and tokenised again, which would
    move the borders. Every row starts with the tokenizer's begin token if it has one.

    Raises:
        InputError: there is no text.
    """
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False).input_ids
    if not ids:
        raise InputError("The text data set holds no text. Give a file with at least one.")
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    width = min(max_length, tokenizer.model_max_length) - len(bos)
    rows = [bos + ids[start : start + width] for start in range(0, len(ids), width)]
    return [Encoded(row, list(row)) for row in rows if len(row) > 1]
