"""Read and write the logs that the field compares: ``TOFU_EVAL.json``, ``TOFU_SUMMARY.json``, ...

``*_EVAL.json`` has one entry per metric: ``agg_value``, and ``value_by_index`` with the index of
the example as a string. Membership inference has such an entry for each of ``forget`` and
``holdout`` beside its ``auc``. What has no value is null and says why: ``not_computed`` which
reference or data are missing, ``not_scored`` that there was nothing to score or that the model's
logits are not finite. ``unscored`` counts examples without a score, ``cut`` those that were cut to
the maximal length. ``interval95`` is the 95 % bootstrap interval of a mean, ``note`` says in words
what a reader should know.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from unlora.errors import InputError
from unlora.runs.atomic_files import write_json
from unlora.runs.safe_loading import read_json, read_mapping

if TYPE_CHECKING:  # numpy takes longer to import than a report to say what is wrong
    from unlora.results.value import Value

KINDS = ("TOFU", "MUSE", "RWKU", "OWN", "LMEval")
Interval = tuple[float, float]
REMEDY = "Was the run interrupted? Repeat it, or leave it out of the report."


@dataclass(frozen=True)
class LogEntry:
    """One metric of a log.

    Attributes:
        content: as the log has it.
    """

    content: Mapping[str, Any]

    @property
    def value(self) -> float | None:
        """The metric's value; None where it has none, and ``reason`` says why."""
        return _finite(self.content.get("agg_value"))

    @property
    def reason(self) -> str | None:
        """Why there is no value, as far as the log says."""
        reasons = (self.content.get(key) for key in ("not_computed", "not_scored"))
        return next((str(reason) for reason in reasons if reason), None)

    @property
    def note(self) -> str | None:
        """What a reader should know of the value."""
        return self.content.get("note") or None

    @property
    def written_interval(self) -> Interval | None:
        """The 95 % interval that the log gives."""
        bounds = self.content.get("interval95")
        if isinstance(bounds, list) and [*map(type, bounds)] == [float, float]:
            return bounds[0], bounds[1]
        return None

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval: the log's, else the percentile bootstrap of the mean over its rows.

        Open-Unlearning's logs give none; there the rows' figure is taken whose mean is the value.
        """
        if "interval95" in self.content or (key := self.averaged_key) is None:
            return self.written_interval
        from unlora.results.value import interval_of_mean

        return interval_of_mean(self.column(key))

    @cached_property
    def rows(self) -> list[Mapping[str, Any]]:
        """What was found for each example, in the order of the data."""
        return _rows(self.content)

    @cached_property
    def averaged_key(self) -> str | None:
        """The figure of the rows that the value is the mean of."""
        value = self.value
        if value is None or not self.rows:
            return None
        for key in self.rows[0]:
            scores = self.column(key)
            if scores and math.isclose(fmean(scores), value, rel_tol=1e-5, abs_tol=1e-9):
                return key
        return None

    def column(self, key: str) -> list[float]:
        """One figure of every row that has it."""
        values = (_finite(row.get(key)) for row in self.rows)
        return [value for value in values if value is not None]

    def as_value(self) -> "Value":
        """The value that was written."""
        from unlora.results.value import Value

        if reason := self.content.get("not_computed"):
            return Value.missing(reason)
        per_example: Any = None
        if "auc" in self.content:
            parts = {part: self.content.get(part) for part in ("forget", "holdout")}
            per_example = {
                part: _with_nan(_rows(entry))
                for part, entry in parts.items()
                if isinstance(entry, Mapping)
            }
        elif "value_by_index" in self.content:
            per_example = _with_nan(self.rows)
        value = float("nan") if self.value is None else self.value
        unscored = self.content.get("unscored", 0)
        return Value(value, per_example, unscored, interval=self.written_interval)


EvalLog = Mapping[str, LogEntry]  # metric -> its entry


def read_log(file: Path, *, key: str = "", remedy: str = REMEDY) -> EvalLog:
    """Read a log, ours or one of Open-Unlearning.

    Args:
        key: of the config that names the file, for the message.
        remedy: what to do about a file that is none.

    Raises:
        InputError: it is no JSON, or no log.
    """
    log = _log(read_mapping(file, key=key, what="evaluation log", remedy=remedy))
    if not any("agg_value" in entry.content for entry in log.values()):
        name = f"{key} {str(file)!r}".lstrip()
        raise InputError(f"{name} is no evaluation log: it has no entry with agg_value. {remedy}")
    return log


def read_written(folder: Path, kind: str) -> tuple[EvalLog, str | None]:
    """What :func:`write_log` wrote: the log and its note; nothing where it wrote none."""
    files = (folder / f"{kind}_EVAL.json", folder / f"{kind}_SUMMARY.json")
    log, summary = (read_json(file) if file.is_file() else {} for file in files)
    return _log(log), summary.get("note") or None


def _log(content: Mapping[str, Any]) -> EvalLog:
    return {name: LogEntry(entry) for name, entry in content.items() if isinstance(entry, dict)}


def write_log(
    folder: Path, kind: str, values: "Mapping[str, Value]", note: str | None = None
) -> None:
    """Write ``<kind>_EVAL.json`` and ``<kind>_SUMMARY.json``, each of them whole or not at all.

    Args:
        note: what a reader should know before any figure; first in the summary.
    """
    write_json(
        folder / f"{kind}_EVAL.json", {name: _entry(values[name]) for name in sorted(values)}
    )
    summary: dict[str, Any] = {"note": note} if note else {}
    summary |= {name: _plain(v.value) for name, v in sorted(values.items()) if not v.not_computed}
    for why in ("not_computed", "not_scored"):
        reasons = {name: getattr(v, why) for name, v in sorted(values.items()) if getattr(v, why)}
        summary |= {why: reasons} if reasons else {}
    write_json(folder / f"{kind}_SUMMARY.json", summary)


def _rows(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """In the order of the index, whatever the order in the file."""
    by_index = entry.get("value_by_index")
    items = by_index.items() if isinstance(by_index, Mapping) else ()
    return [row for _, row in sorted(items, key=_place) if isinstance(row, Mapping)]


def _place(item: tuple[str, Any]) -> tuple[int, str]:
    return (int(item[0]), "") if item[0].isdecimal() else (0, item[0])


def _with_nan(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: v if isinstance(v, str) else _number(v) for key, v in row.items()} for row in rows
    ]


def _finite(value: Any) -> float | None:
    """A number of a log; None for whatever is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _entry(value: "Value") -> dict[str, Any]:
    if value.not_computed:
        return {"agg_value": None, "not_computed": value.not_computed}
    facts: dict[str, Any] = {
        "not_scored": value.not_scored,
        "unscored": value.unscored,
        "cut": value.cut,
        "interval95": value.interval and [_plain(bound) for bound in value.interval],
        "note": value.note,
    }
    facts = {key: fact for key, fact in facts.items() if fact}
    rows = value.per_example
    if isinstance(rows, Mapping):
        parts = {
            part: {
                "agg_value": _plain(value.mean(row, "score").value),
                "value_by_index": _by_index(row),
            }
            for part, row in rows.items()
        }
        return parts | {"auc": _plain(value.value), "agg_value": _plain(value.value)} | facts
    if rows is None:
        return {"agg_value": _plain(value.value)} | facts
    return {"agg_value": _plain(value.value), "value_by_index": _by_index(rows)} | facts


def _by_index(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {str(i): {k: _plain(v) for k, v in row.items()} for i, row in enumerate(rows)}


def _plain(value: Any) -> Any:
    """For JSON, which knows no NaN and no infinity."""
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, Real) and not math.isfinite(value) else value


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(entry) for entry in value]
    return float("nan") if value is None else value
