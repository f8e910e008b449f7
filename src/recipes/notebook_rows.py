"""Take questions and answers as a notebook has them: check pairs, and write them as files."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unlora.errors import InputError
from unlora.runs.atomic_files import write_text

logger = logging.getLogger(__name__)


def checked_rows(data: Mapping[str, Any]) -> dict[str, Any]:
    """name -> rows to be written, or a file of the user's; what is None is left out.

    Raises:
        InputError: no rows, or one that is not two texts.
    """
    parts = {name: _rows(name, rows) for name, rows in data.items() if rows is not None}
    forget, retain = parts.get("forget"), parts.get("retain")
    if isinstance(forget, list) and isinstance(retain, list):
        both = sum(row in retain for row in forget)
        if both:
            logger.warning("%d of %d forget rows are in retain, too.", both, len(forget))
    return parts


def _rows(name: str, data: Any) -> "str | list[dict[str, str]]":
    if isinstance(data, (str, Path)):
        return os.path.expanduser(data)
    wanted = "it must be a list of (question, answer) pairs, or a file of them."
    if isinstance(data, Mapping) or not hasattr(data, "__iter__"):
        raise InputError(f"{name} is {data!r}; {wanted}")
    pairs = list(data)
    if not pairs:
        raise InputError(f"{name} is empty; {wanted}")
    for number, pair in enumerate(pairs):
        texts = isinstance(pair, (tuple, list)) and [t for t in pair if isinstance(t, str)]
        if not texts or len(pair) != 2 or len(texts) != 2 or not all(t.strip() for t in texts):
            raise InputError(f"{name}[{number}] is {pair!r}; it must be (question, answer).")
    return [{"question": question, "answer": answer} for question, answer in pairs]


def write_rows(data: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Write the rows as JSON Lines; returns the file of each name."""
    files = {}
    for name, rows in data.items():
        files[name] = rows if isinstance(rows, str) else str(folder / f"{name}.jsonl")
        if not isinstance(rows, str):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_text(Path(files[name]), "".join(lines))
    return files
