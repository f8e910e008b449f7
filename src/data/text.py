"""Tokenise running text: rows to train on, and continuations to score."""

from collections.abc import Sequence

from unlora.data.control_tokens import ControlTokens
from unlora.data.encoded import Encoded, cut_prompt, fit
from unlora.errors import InputError

STAND_IN = "A"  # a text that begins with a letter, where only what is before it is wanted


def chunks(control: ControlTokens, texts: Sequence[str], *, max_length: int) -> list[Encoded]:
    """All texts, joined by empty lines, cut into rows of ``max_length`` tokens.

    The text is tokenised once and the ids are cut, never decoded and tokenised again, which would
    move the borders. Every row starts with the tokenizer's begin token if it has one.

    Raises:
        InputError: there is no text.
    """
    tokenizer = control.tokenizer
    ids, _ = control.encode_plain("\n\n".join(texts), add_special_tokens=False)
    if not ids:
        raise InputError("The text data set holds no text. Give a file with at least one.")
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    width = min(max_length, tokenizer.model_max_length) - len(bos)
    rows = [bos + ids[start : start + width] for start in range(0, len(ids), width)]
    return [Encoded(row, list(row)) for row in rows if len(row) > 1]


def encode_text(control: ControlTokens, text: str, *, max_length: int, prefix: str = "") -> Encoded:
    """Plain text as tokens, all of it scored except ``prefix``; no end token is added."""
    tokenizer = control.tokenizer
    ids, start = _plain_text(control, prefix, text)
    if start >= len(ids):
        raise InputError(f"The text {text!r} is empty; there is nothing to score. Leave it out.")
    room = min(max_length, tokenizer.model_max_length)
    return fit(ids[:start], ids[start:], room, tokenizer.bos_token_id)


def text_prompt(control: ControlTokens, prefix: str, *, room: int) -> Encoded:
    """What generation continues after a plain text; see :meth:`Chat.prompts`."""
    ids, start = _plain_text(control, prefix, STAND_IN if prefix[-1:].isspace() else "")
    return cut_prompt(ids[:start], room, control.tokenizer.bos_token_id)


def _plain_text(control: ControlTokens, prefix: str, text: str) -> tuple[list[int], int]:
    """The tokens of a prefix and a text, and where the text begins; none is a control token."""
    ids, offsets = control.encode_plain(prefix + text, add_special_tokens=True)
    if ids and ids[-1] == control.tokenizer.eos_token_id and offsets[-1] == (0, 0):
        ids.pop()
    start = next((i for i, (_, end) in enumerate(offsets) if end > len(prefix)), len(ids))
    return ids, min(start, len(ids))
