"""Read rows of a file: .json, .jsonl, .parquet, .csv or .txt."""

import csv
import io
import json
import sys
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from unlora.errors import InputError

SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".txt")


def read_file(file: Path) -> list[dict[str, Any]]:
    """The rows of a .json (one array, or a row a line), .jsonl, .parquet, .csv or .txt file.

    A line of plain text is a row with the column ``text``.

    Raises:
        InputError: the file is empty, damaged, or holds something other than rows.
    """
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        rows = _read_parquet(file)
    elif suffix not in SUFFIXES:
        raise InputError(f"{file} is of an unknown kind; it must be one of {', '.join(SUFFIXES)}.")
    else:
        text = _read_text(file)
        if suffix == ".csv":
            rows = _read_csv(file, text)
        elif suffix == ".txt":
            rows = [{"text": line} for line in text.splitlines() if line.strip()]
        else:
            rows = _read_json(file, text)
    if not rows:
        raise InputError(f"{file} holds no rows. Give a file with at least one.")
    return rows


def _read_csv(file: Path, text: str) -> list[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # a cell may hold a whole book
    # newline="": only line ends end a line, not the other separators that splitlines() knows
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows, line = [], 1
    try:
        names = list(reader.fieldnames or ())
        line = reader.line_num + 1
        for row in reader:
            rows.append(row)
            line = reader.line_num + 1
    except csv.Error as error:
        blank = takewhile(lambda text: not text.strip(), text.split("\n")[line - 1 :])
        line += sum(1 for _ in blank)
        raise InputError(
            f"{file}, line {line}: a cell begins with a double quote and does not end with one "
            f'({error}). Close the quote, and write "" for a quote within it.'
        ) from error
    for name in names:
        if name and names.count(name) > 1:
            raise InputError(_twice(f"{file}, its header", name))
    for sign, called in ((";", "a semicolon"), ("\t", "a tab")):
        if len(names) == 1 and sign in names[0]:
            raise InputError(
                f"{file} has the one column {names[0]!r}. Cells must have a comma between them, "
                f"not {called}: save it with commas."
            )
    whole = []
    for number, row in enumerate(rows, start=1):
        cells = [*row.values(), *row.get(None, ())]
        if not any(isinstance(cell, str) and cell.strip() for cell in cells):
            continue  # a line of commas alone, as spreadsheets leave them
        if None in row:
            raise InputError(
                f"{file}, row {number} has more cells than the header has names. Put double quotes "
                "around text that holds a comma."
            )
        whole.append(row)
    return whole


def _read_json(file: Path, text: str) -> list[dict[str, Any]]:
    if text.lstrip().startswith("["):
        rows = _from_json(file, text, 1, "The file begins as one array of rows; is its end there?")
    else:
        wanted = "Each line must hold one row as JSON, or the whole file one array of rows."
        # only "\n" ends a line: JSON text may hold other separators that splitlines() knows
        rows = [
            _from_json(file, line, number, wanted)
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
    half = "\\ud" in text.lower()
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError(
                f"{file}, row {number} is {repr(row)[:80]}; a row must be an object with columns."
            )
        if half and not _is_unicode(row):
            raise InputError(
                f"{file}, row {number} holds half a character (\\ud800 to \\udfff on its own), "
                "which is no text. Write the file again, or leave the row out."
            )
    return rows


def _from_json(file: Path, text: str, line: int, wanted: str) -> Any:
    """What a text that begins in this line of a file says."""
    where = "a row" if text.lstrip().startswith("[") else f"line {line}"

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = {sys.intern(name): value for name, value in pairs}  # a name is one object
        if len(mapping) < len(pairs):
            names = [name for name, _ in pairs]
            name = next(name for name in names if names.count(name) > 1)
            raise InputError(_twice(f"{file}, {where}", name))
        return mapping

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        at = line + error.lineno - 1
        raise InputError(f"{file}, line {at}: {error.msg}. {wanted}") from error
    except RecursionError as error:
        raise InputError(f"{file}, line {line} is nested too deep. {wanted}") from error
    except InputError:
        raise
    except ValueError as error:
        raise InputError(
            f"{file}, {where} holds a number of too many digits. Put double quotes around it if it "
            "is text."
        ) from error


def _twice(where: str, name: str) -> str:
    return (
        f"{where} holds {name!r} twice, and only one of them could be read. Rename one, "
        "or leave it out."
    )


def _is_unicode(row: Mapping[str, Any]) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(file: Path) -> list[dict[str, Any]]:
    from pyarrow import ArrowException, parquet, string, types

    try:
        table = parquet.read_table(file)
        columns = {}
        for name, column in zip(table.column_names, table.columns, strict=True):
            if types.is_float32(column.type) or types.is_float16(column.type):
                # 0.1 and not 0.10000000149011612
                texts = column.cast(string()).to_pylist()
                columns[name] = [None if text is None else float(text) for text in texts]
            else:
                columns[name] = column.to_pylist()
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    except UnicodeDecodeError as error:
        text = error.object[max(0, error.start - 20) : error.end + 20]
        raise InputError(
            f"{file} holds text that is not UTF-8: {text!r}. Write its text columns as UTF-8."
        ) from error
    except (ArrowException, OSError) as error:
        why = " ".join(str(error).split()).rstrip(".")
        raise InputError(
            f"{file} is not a whole parquet file ({why}). Write or copy it again."
        ) from error


def _read_text(file: Path) -> str:
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte {error.start}"
        raise InputError(f"{file} is not UTF-8 text ({where}). Save it as UTF-8.") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from error
    if (at := text.find("\0")) >= 0:  # UTF-16 without its mark is UTF-8 with zeros, to Python
        raise InputError(
            f"{file} is not UTF-8 text (character {at} is a zero). Save it as UTF-8; if it was not "
            "written to its end, write it again."
        )
    return text
