"""Read the rows of a deletion request, and find them in what runs were trained on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unlora.data.conversations import SHAPES
from unlora.data.files import read_file
from unlora.data.rows import load_rows
from unlora.errors import InputError
from unlora.recipes.who_saw import find_rows
from unlora.registry import unknown

Rows = Sequence[Mapping[str, Any]]
TEXT = "PretrainingDataset"
KEYS = ("question_key", "answer_key", "text_key")


@dataclass(frozen=True)
class DataSet:
    """A data set as a training declares it: ``{"handler": ..., "args": {"hf_args": ..., ...}}``.

    Attributes:
        part: ``train``, ``forget``, ``retain`` or ``alternate``.
        name: its key in the part.
    """

    part: str
    name: str
    declared: Mapping[str, Any]
    datasets_dir: str | None = None

    @property
    def is_text(self) -> bool:
        return bool(self.declared["handler"] == TEXT)

    @property
    def columns(self) -> dict[str, str]:
        """``question_key``, ``answer_key`` and ``text_key``, those of the signature where unset."""
        return {key: self.declared["args"].get(key) or key.removesuffix("_key") for key in KEYS}

    @property
    def source(self) -> dict[str, Any]:
        """``hf_args`` of the whole split, of which rows have their numbers."""
        hub = self.declared["args"]["hf_args"]
        left_out = ("select", "exclude")
        return {k: v for k, v in hub.items() if k not in left_out and v != "(hidden)"}

    def numbered(self) -> dict[int, dict[str, Any]]:
        """Number in the split -> row, of those that the training reads.

        Raises:
            InputError: the data is not there any more.
        """
        hub = self.declared["args"]["hf_args"]
        rows = load_rows(**self.source, datasets_dir=self.datasets_dir)
        numbers = range(len(rows)) if hub.get("select") is None else hub["select"]
        without = set(hub.get("exclude") or ())
        return {number: rows[number] for number in numbers if number not in without}

    def with_rows(self, numbers: Sequence[int]) -> "DataSet":
        """Some of its rows, by number."""
        return self._with({**self.source, "select": list(numbers)})

    def without_rows(self, numbers: Sequence[int]) -> "DataSet":
        """The data set without some of its rows, by number."""
        hub = self.declared["args"]["hf_args"]
        left_out = sorted({*(hub.get("exclude") or ()), *numbers})
        return self._with({**hub, "exclude": left_out}) if left_out else self

    def _with(self, hub: Mapping[str, Any]) -> "DataSet":
        args = {**self.declared["args"], "hf_args": dict(hub)}
        return replace(self, declared={**self.declared, "args": args})


def data_sets(config: Mapping[str, Any], *parts: str) -> Iterator[DataSet]:
    """The data sets of a run's config, of these parts."""
    folder = (config.get("paths") or {}).get("datasets_dir")
    for part in parts:
        sets = (config.get("data") or {}).get(part)
        for name, declared in sets.items() if isinstance(sets, Mapping) else ():
            if declared:
                yield DataSet(part, name, declared, folder)


def read_request(file: str, columns: Mapping[str, str]) -> tuple[DataSet, list[dict[str, Any]]]:
    """The rows of a file, and the data set that they are.

    Args:
        columns: ``question_key``, ``answer_key``, ``text_key``, where they are not called so.

    Raises:
        InputError: there is no such file, or it holds neither questions and answers nor text.
    """
    if not Path(file).is_file():
        raise InputError(
            f"There is no file {file!r}. Give the rows that must go as .jsonl, .json, .csv, "
            ".parquet or .txt, or say which of the model's own: --where COLUMN=VALUE"
        )
    rows = read_file(Path(file))
    question, answer, text = (columns.get(key) or key.removesuffix("_key") for key in KEYS)
    first = rows[0]
    shaped = any(all(column in first for column in shape) for shape in SHAPES)
    if question not in first and not shaped:
        if text not in first:
            raise InputError(
                f"{file} has neither questions and answers nor text: "
                + unknown("column", question, first)
                + " Say which they are: --question-key and --answer-key, or --text-key."
            )
        args: dict[str, Any] = {"text_key": text}
        handler = TEXT
    else:
        args, handler = {"question_key": question, "answer_key": answer}, "QADataset"
    declared = {"handler": handler, "args": {"hf_args": {"path": file}, **args}}
    return DataSet("forget", "request", declared), rows


def rows_where(sets: Sequence[DataSet], condition: str) -> tuple[DataSet, list[dict[str, Any]]]:
    """The rows of a model's own data in which a column has a value.

    Args:
        condition: ``customer=17``.

    Raises:
        InputError: it is no condition, no data set has the column, none or several have rows.
    """
    column, equals, value = condition.partition("=")
    if not (column and equals):
        raise InputError(f"--where is {condition!r}; it must be COLUMN=VALUE: --where customer=17")
    known: dict[str, None] = {}
    matches: dict[str, tuple[DataSet, dict[int, dict[str, Any]]]] = {}
    for data_set in sets:
        rows = data_set.numbered()
        known |= dict.fromkeys(str(name) for row in rows.values() for name in row)
        chosen = {n: row for n, row in rows.items() if str(row.get(column, "\0")) == value}
        if chosen:
            matches.setdefault(str(data_set.source), (data_set, chosen))
    if column not in known:
        raise InputError(f"--where {condition}: {unknown('column', column, list(known))}")
    if not matches:
        raise InputError(f"--where {condition}: no row of the model's own data has that value.")
    if len(matches) > 1:
        raise InputError(
            f"--where {condition}: rows of {len(matches)} data sets have that value. Write them "
            "into one file, and give that."
        )
    [(data_set, chosen)] = matches.values()
    request = data_set.with_rows(list(chosen))
    return replace(request, part="forget", name="request"), list(chosen.values())


def matches_in(data_set: DataSet, request: DataSet, rows: Rows) -> dict[str, list[int]]:
    """``exact`` and ``near``: numbers of the rows of a data set that are among those requested."""
    own = data_set.numbered()
    if data_set.is_text != request.is_text:
        return {"exact": [], "near": []}
    wanted = _renamed(rows, request.columns, data_set.columns)
    kinds = find_rows(wanted, list(own.values()), **data_set.columns)
    pairs = list(zip(own, kinds, strict=True))
    return {kind: [n for n, match in pairs if match == kind] for kind in ("exact", "near")}


def _renamed(
    rows: Rows, columns: Mapping[str, str], others: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Rows whose question, answer and text are in columns of other names."""
    names = {columns[key]: others[key] for key in KEYS}
    return [{names.get(name, name): cell for name, cell in row.items()} for row in rows]
