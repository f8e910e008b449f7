"""Logs that the field compares: ``TOFU_EVAL.json`` and ``TOFU_SUMMARY.json``, ``MUSE_...``.

``*_EVAL.json`` has one entry per metric: ``agg_value``, and ``value_by_index`` with the index of
the example as a string. Membership inference has such an entry for each of ``forget`` and
``holdout`` beside its ``auc``. What has no value is null and says why: ``not_computed`` which
reference or data are missing, ``not_scored`` that there was nothing to score or that the model's
logits are not finite. ``unscored`` counts examples without a score, ``cut`` those that were cut to
the maximal length. ``interval95`` is the 95 % bootstrap interval of a mean, ``note`` says in words
what a reader should know.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unlora.errors import InputError
from unlora.registry import unknown
from unlora.results.value import Value
from unlora.runs.run import write_json
from unlora.runs.safe_loading import read_json

# what stands in a log and not in an evaluation -> the key of the config that names the log
KEYS = {"reference": "retain_logs_path", "target": "target_logs_path"}
WHAT = {"retain_logs_path": "the retain model's", "target_logs_path": "the target's"}
WHOSE = {
    "retain_logs_path": "a model that never saw the forget data",
    "target_logs_path": "the model before it was made to forget",
}


def write_log(
    folder: Path, kind: str, values: Mapping[str, Value], note: str | None = None
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


def intervals(folder: Path, kind: str) -> dict[str, tuple[float, float]]:
    """The 95 % intervals of the log in a folder: metric -> lower and upper bound."""
    return {
        name: (entry["interval95"][0], entry["interval95"][1])
        for name, entry in _written(folder / f"{kind}_EVAL.json").items()
        if entry.get("interval95")
    }


def notes(folder: Path, kind: str) -> dict[str, str]:
    """What a reader should know of the figures of the log in a folder: metric -> in words.

    Under the empty name what should be known before any of them.
    """
    first = {"": note} if (note := _written(folder / f"{kind}_SUMMARY.json").get("note")) else {}
    entries = _written(folder / f"{kind}_EVAL.json").items()
    return first | {name: entry["note"] for name, entry in entries if entry.get("note")}


def _written(file: Path) -> dict[str, Any]:
    """What :func:`write_log` wrote; nothing where the file is not there."""
    try:
        content: dict[str, Any] = json.loads(file.read_text("utf-8"))
        return content
    except OSError:
        return {}


def find_log(path: str | Path, kind: str, key: str = "retain_logs_path") -> Path:
    """The log file that a path stands for: the file itself, or the one of a run folder.

    Args:
        key: of the config, for the message.

    Raises:
        InputError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    candidates = (path / "evals" / f"{kind}_EVAL.json", path / f"{kind}_EVAL.json")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise InputError(
        f"{key} {str(path)!r} is not there. Give the {kind}_EVAL.json of {WHOSE[key]}, or the run "
        "folder that holds it."
        if not path.exists()
        else f"{key} {str(path)!r} holds no {kind}_EVAL.json, neither directly nor in evals/. "
        "Evaluate that model first, or give another folder."
    )


class Log:
    """The log of another model: the one without the forget data, or the one before unlearning.

    Args:
        path: log file or run folder; None when there is no such model.
        key: of the config, for messages.
        advice: how to come by a log that is missing.
        missed: False where nobody expects one, as of a model that is a reference itself.

    Raises:
        InputError: it is not there, or it is no log.
    """

    def __init__(
        self,
        path: str | Path | None,
        kind: str,
        key: str = "retain_logs_path",
        advice: str | None = None,
        missed: bool = True,
    ):
        self.kind, self.key, self.advice, self.missed = kind, key, advice, missed
        self.file = find_log(path, kind, key) if path else None
        other = re.fullmatch(r"([A-Za-z]+)_EVAL\.json", self.file.name) if self.file else None
        if other and other[1] != kind:
            raise InputError(
                f"{key} {str(self.file)!r} is a log of {other[1]}, and this evaluation is of "
                f"{kind}. Give the {kind}_EVAL.json of {WHOSE[key]}."
            )
        self.entries: dict[str, Any] = {}
        if self.file:
            try:
                self.entries = read_json(self.file)
            except (ValueError, OSError) as error:
                raise InputError(f"{key} {str(self.file)!r} is not JSON: {error}") from error
            if not isinstance(self.entries, dict) or not any(
                isinstance(entry, dict) and "agg_value" in entry for entry in self.entries.values()
            ):
                raise InputError(
                    f"{key} {str(self.file)!r} is no evaluation log: it has no entry with "
                    f"agg_value. Give a {kind}_EVAL.json."
                )

    @classmethod
    def of(cls, which: str, config: Mapping[str, Any], kind: str) -> "Log":
        """The log that a suite's config names for ``reference`` or ``target``.

        A path that is still to be found (``auto``, or a model) stands for no log.
        """
        key = KEYS[which]
        given = config.get(key)
        if isinstance(given, Mapping):  # nothing was found for it
            return cls(None, kind, key, given["advice"], given.get("missed", True))
        return cls(given, kind, key)

    def value(self, name: str) -> Value:
        """The retain model's value of a metric, or why there is none."""
        if self.file is None:
            advice = self.advice or (
                f"Evaluate {WHOSE[self.key]} and give its {self.kind}_EVAL.json as {self.key}"
            )
            return Value.missing(f"{WHAT[self.key]} log is missing. {advice}")
        if name not in self.entries:
            return Value.missing(
                f"the log {self.file} has no entry {name}. {unknown('metric', name, self.entries)}"
            )
        entry = self.entries[name]
        if not isinstance(entry, dict) or entry.get("agg_value") is None:
            return Value.missing(f"the log {self.file} has no value for {name}")
        return read_value(entry)

    def values(self) -> dict[str, Value]:
        """Every metric that the log has a value of."""
        found = {name: self.value(name) for name in self.entries}
        return {name: value for name, value in found.items() if not value.not_computed}


def read_value(entry: Mapping[str, Any]) -> Value:
    """The value that one entry of a log holds."""
    reason = entry.get("not_computed")
    if reason:
        return Value.missing(reason)
    per_example: Any = None
    if "auc" in entry:
        per_example = {part: _rows(entry[part]) for part in ("forget", "holdout") if part in entry}
    elif "value_by_index" in entry:
        per_example = _rows(entry)
    interval = entry.get("interval95")
    return Value(
        _number(entry["agg_value"]),
        per_example,
        entry.get("unscored", 0),
        interval=tuple(interval) if interval else None,
    )


def _rows(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """In the order of the index, whatever the order in the file."""
    by_index = sorted(entry["value_by_index"].items(), key=lambda item: int(item[0]))
    return [
        {k: v if isinstance(v, str) else _number(v) for k, v in row.items()} for _, row in by_index
    ]


def _entry(value: Value) -> dict[str, Any]:
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
                "agg_value": _plain(Value.mean(found, "score").value),
                "value_by_index": _by_index(found),
            }
            for part, found in rows.items()
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
        return [_plain(one) for one in value]
    return None if isinstance(value, (float, np.floating)) and not math.isfinite(value) else value


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(one) for one in value]
    return float("nan") if value is None else value
