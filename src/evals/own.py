"""Read data that a user brings: files that may not be there, and rows with holes.

A data set of a suite says with ``needed`` and ``optional`` which of its keys may find nothing, and
what the user can do then. Without what is needed there is an error; without what is optional the
figures on that data set are not computed, and say why.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from unlora.data.qa import question_of, text_of
from unlora.errors import InputError
from unlora.registry import unknown


def has_holes(config: Mapping[str, Any]) -> bool:
    """Whether a data set says what to do about what is not there."""
    return "needed" in config or "optional" in config


def not_given(name: str, config: Mapping[str, Any]) -> str | None:
    """Why a data set is not there, where its file is optional and was not given."""
    for key, advice in config.get("optional", {}).items():
        if key.endswith("hf_args") and not config[key].get("path"):
            return f"the data set {name} is not there: {advice}"
    return None


def without_column(
    name: str, config: Mapping[str, Any], columns: Mapping[str, str], rows: Sequence[Mapping]
) -> str | None:
    """Why a data set cannot be used, where none of its rows has anything in an optional column.

    Args:
        columns: key of the config -> the column it names.

    Raises:
        InputError: there is no such column, or nothing in it, and it is needed.
    """
    there = {column for row in rows for column in row}
    filled = {
        key for row in rows for key, cell in row.items() if not _is_empty(cell) and cell != []
    }
    for key, column in columns.items():
        if not has_holes(config) or column in filled:
            continue
        advice = config.get("optional", {}).get(key)
        if advice:
            what = "nothing in its column" if column in there else "no column"
            return f"the data set {name} has {what} {column!r}: {advice}"
        if column in there:
            raise InputError(
                f"No row has anything in its column {column!r}. Fill it, or give another file."
            )
        advice = config.get("needed", {}).get(key, "")
        raise InputError(f"{unknown('column', column, there)} {advice}".rstrip())
    return None


def whole(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, several: bool = False
) -> list[dict[str, Any]]:
    """The rows with all of these columns, empty where a row has nothing there.

    Args:
        columns: the question, then the answer. Without a question there is nothing to ask, so the
            answer is left out, too.
        several: answers are lists; one text is a list of one.

    Raises:
        InputError: a cell holds what is neither text, nor a number, nor nothing.
    """
    filled = []
    for number, row in enumerate(rows):
        cells = [None if _is_empty(cell := row.get(column)) else cell for column in columns]
        for column, cell in zip(columns, cells, strict=True):
            if isinstance(cell, (list, tuple)) and column != columns[0]:
                for text in cell:
                    text_of(text, column, number)
            elif cell is not None:
                question_of(cell, column, number)
        if _is_empty(cells[0]):
            cells = ["" for _ in cells]
        if several:
            cells[-1] = _listed(cells[-1])
        filled.append({**row, **dict(zip(columns, cells, strict=True))})
    return filled


def _is_empty(cell: Any) -> bool:
    # JSON that pandas wrote has NaN where there was nothing
    return cell is None or cell != cell or (isinstance(cell, str) and not cell.strip())


def _listed(cell: Any) -> list[Any]:
    """A list as it stands in a file; CSV knows only text: ``["so", "or so"]``."""
    if _is_empty(cell):
        return []
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            return list(json.loads(cell))
        except ValueError:
            return [cell]
    return list(cell) if isinstance(cell, (list, tuple)) else [cell]
