"""Find rows among others, and hash them."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from unlora.data.conversations import as_questions

Rows = Sequence[Mapping[str, Any]]


def _texts(rows: Rows, question_key: str, answer_key: str, text_key: str) -> list[str]:
    texts = []
    for row in rows:
        if text_key in row and question_key not in row:
            texts.append(str(row[text_key]).strip())
            continue
        pairs = as_questions([row], question_key, answer_key)
        texts.append("\x1f".join(f"{p[question_key]}\x1e{p[answer_key]}" for p in pairs))
    return texts


def find_rows(
    wanted: Rows, rows: Rows, *, question_key: str = "question", answer_key: str = "answer",
    text_key: str = "text",
) -> list[Literal["exact", "near"] | None]:  # fmt: skip
    """Whether each row is among those that are wanted."""
    texts = set(_texts(wanted, question_key, answer_key, text_key))
    return ["exact" if t in texts else None
            for t in _texts(rows, question_key, answer_key, text_key)]  # fmt: skip


def row_hashes(
    rows: Rows, folder: str, *, question_key: str = "question", answer_key: str = "answer",
    text_key: str = "text",
) -> list[str]:  # fmt: skip
    """Hash each row."""
    return [hashlib.sha256(t.encode()).hexdigest()[:16]
            for t in _texts(rows, question_key, answer_key, text_key)]  # fmt: skip
