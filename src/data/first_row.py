"""Show the first row of a data set as tokens: what is read, and what is scored."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from unlora.data.encoded import Encoded
from unlora.forward import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST = 120  # tokens of a part that are shown: its beginning and its end


def pieces(tokenizer: "PreTrainedTokenizerBase", row: Encoded) -> dict[str, list[str]]:
    """The tokens of one row as text, those that are ``read`` only and those that are ``scored``."""
    labels = zip(row.input_ids, row.labels, strict=True)
    parts: dict[str, list[str]] = {"read": [], "scored": []}
    for token, label in labels:
        part = "read" if label == IGNORE_INDEX else "scored"
        parts[part].append(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    return parts


def as_lines(name: str, parts: Mapping[str, Sequence[str]]) -> str:
    """A few lines for people: what is read, what is scored, and a prompt that is another one."""
    lines = [f"{name}, the first row:"]
    for part, tokens in parts.items():
        if part != "read" and tokens == parts.get("read"):
            continue
        shown = [repr(token) for token in tokens]
        if len(shown) > MOST:
            shown[MOST // 2 : -MOST // 2] = [f"... {len(shown) - MOST} more ..."]
        lines.append(f"  {part:12} {len(tokens):5}  {' '.join(shown)}")
    return "\n".join(lines)
