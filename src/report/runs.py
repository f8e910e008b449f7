"""Runs as a report reads them: folders with logs, and what is beside them."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from unlora.errors import InputError
from unlora.runs.safe_loading import read_json as json_in

Role = Literal["target", "gold", "method"]
KINDS = ("TOFU", "MUSE", "RWKU", "OWN", "LMEval")
RECORDS = ("manifest", "run_config", "eval_manifest", "eval_config", "lineage")
RESAMPLES = 2000


@dataclass(frozen=True)
class Entry:
    """One run on the page; entries of one name and different seeds are one row of its table.

    Args:
        folder: a run folder of ours, one with a log and nothing else, or one of Open-Unlearning's
            ``saves/``.
        seed: None where there is but one.
    """

    name: str
    role: Role
    folder: Path
    seed: int | None = None


@dataclass(frozen=True)
class Result:
    """What one run left.

    Attributes:
        logs: kind of log -> metric -> its entry in the log.
        records: file name without ``.json`` -> content, of those that are there.
    """

    entry: Entry
    logs: Mapping[str, Mapping[str, Mapping[str, Any]]]
    records: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved config of the training, or of the evaluation of a model from elsewhere."""
        return self.records.get("run_config") or self.records.get("eval_config") or {}

    @property
    def manifest(self) -> Mapping[str, Any]:
        return self.records.get("manifest") or self.records.get("eval_manifest") or {}


@dataclass(frozen=True)
class Cell:
    """One metric of one row of the table.

    Attributes:
        mean: over the seeds; None where a seed has no value.
        seeds: the value of each seed.
        interval: 95 %, over the questions: the mean of the seeds' bounds.
        note: why there is no value, or what a reader should know of it.
    """

    mean: float | None = None
    seeds: tuple[float | None, ...] = ()
    interval: tuple[float, float] | None = None
    note: str | None = None


@dataclass(frozen=True)
class Row:
    """One run with all its seeds."""

    name: str
    role: Role
    results: tuple[Result, ...]

    @property
    def kinds(self) -> set[str]:
        return {kind for result in self.results for kind in result.logs}

    def cell(self, kind: str, metric: str) -> Cell:
        found = [result.logs.get(kind, {}).get(metric, {}) for result in self.results]
        seeds = tuple(number(entry) for entry in found)
        known = [value for value in seeds if value is not None]
        bounds = [interval(entry) for entry in found]
        whole = [bound for bound in bounds if bound is not None]
        notes = (entry.get(key) for entry in found for key in ("not_computed", "not_scored"))
        return Cell(
            fmean(known) if known and len(known) == len(seeds) else None,
            seeds,
            (fmean(low for low, _ in whole), fmean(high for _, high in whole))
            if whole and len(whole) == len(seeds)
            else None,
            next((str(note) for note in notes if note), None),
        )

    def figures(self) -> dict[str, dict[str, Any]]:
        """metric -> ``{"mean", "seeds"}``, of all that some seed has computed."""
        computed = {
            (metric, kind)
            for result in self.results
            for kind, log in result.logs.items()
            for metric, entry in log.items()
            if not entry.get("not_computed")
        }
        cells = {metric: self.cell(kind, metric) for metric, kind in sorted(computed)}
        return {name: {"mean": c.mean, "seeds": list(c.seeds)} for name, c in cells.items()}

    def scores(self, kind: str, metric: str, key: str) -> list[float]:
        """A figure of every question, of all seeds."""
        entries = (result.logs.get(kind, {}).get(metric, {}) for result in self.results)
        tables = (entry.get("value_by_index") for entry in entries)
        return [x for table in tables if isinstance(table, Mapping) for x in _column(table, key)]

    def count(self, kind: str, metric: str, key: str) -> int:
        """The sum over the seeds of a count in the log, such as ``unscored``."""
        found = (result.logs.get(kind, {}).get(metric, {}).get(key) for result in self.results)
        return sum(count for count in found if isinstance(count, int))


def read_rows(entries: Sequence[Entry]) -> list[Row]:
    """The rows of a table: target first, then gold, then methods in the order given.

    Raises:
        InputError: nothing to read, a folder without a log, or entries that contradict each other.
    """
    if not entries:
        raise InputError("There is nothing to report. Give run folders: unlora report RUN RUN ...")
    by_name: dict[str, list[Entry]] = {}
    for entry in entries:
        by_name.setdefault(entry.name, []).append(entry)
    for name, same in by_name.items():
        if len({entry.seed for entry in same}) < len(same) or len({e.role for e in same}) > 1:
            raise InputError(
                f"{len(same)} runs are called {name!r}, and they are not seeds of one run: "
                f"{', '.join(str(entry.folder) for entry in same)}. Leave all but one out."
            )
    order = {"target": 0, "gold": 1, "method": 2}
    rows = [
        Row(name, same[0].role, tuple(read(entry) for entry in same))
        for name, same in sorted(by_name.items(), key=lambda item: order[item[1][0].role])
    ]
    for role in ("target", "gold"):
        for kind in KINDS:
            names = [row.name for row in rows if row.role == role and kind in row.kinds]
            if len(names) > 1:
                raise InputError(
                    f"{len(names)} runs are the {role}: {', '.join(names)}. "
                    f"Say which one it is: unlora report ... --{role} RUN"
                )
    return rows


def read(entry: Entry) -> Result:
    """The logs of a run, and what else it says of itself.

    Raises:
        InputError: the folder is not there, holds no log, or a file in it is broken.
    """
    found = find_logs(entry.folder)
    if not found:
        raise InputError(
            f"The folder {str(entry.folder)!r} holds no evaluation log ({', '.join(KINDS)}: "
            "<kind>_EVAL.json), neither directly nor in evals/ or a checkpoint's. "
            f"Evaluate the model first: unlora eval ... model={entry.folder}"
        )
    logs = {kind: _log(file) for kind, file in found.items()}
    return Result(entry, logs, read_records(entry.folder, *found.values()))


def find_logs(folder: Path) -> dict[str, Path]:
    """kind -> its log in a run folder; that of the last checkpoint where there are several.

    Raises:
        InputError: the folder is not there, or has logs of several splits.
    """
    if not folder.is_dir():
        raise InputError(
            f"There is no folder {str(folder)!r}. Give run folders, e.g. saves/unlearn/mine."
        )
    checkpoints = sorted(folder.glob("checkpoint-*"), key=_number_of, reverse=True)
    homes = [folder / "evals", folder, *(checkpoint / "evals" for checkpoint in checkpoints)]
    found: dict[str, Path] = {}
    for kind in KINDS:
        name = f"{kind}_EVAL.json"
        of_splits = sorted(folder.glob(f"evals_*/{name}"))
        file = next((home / name for home in homes if (home / name).is_file()), None)
        if file is None and len(of_splits) > 1:
            raise InputError(
                f"{str(folder)!r} has logs of several splits. Give one of them: "
                + ", ".join(str(one.parent) for one in of_splits)
            )
        file = file or next(iter(of_splits), None)
        if file is not None:
            found[kind] = file
    return found


def read_records(folder: Path, *logs: Path) -> dict[str, Mapping[str, Any]]:
    """What a run folder says of itself: the records of :data:`RECORDS` that are there.

    Args:
        logs: those of an evaluation may be beside its log.
    """
    records: dict[str, Mapping[str, Any]] = {}
    for name in RECORDS:
        for home in (folder, *(log.parent for log in logs)):
            if name not in records and (home / f"{name}.json").is_file():
                records[name] = read_json(home / f"{name}.json")
    if "run_config" not in records:
        for home in (folder, *folder.parents[:1]):
            if (home / ".hydra" / "config.yaml").is_file():
                records["run_config"] = _read_yaml(home / ".hydra" / "config.yaml")
                break
    if "training" not in records.get("manifest", {}):
        states = sorted(
            [*folder.glob("trainer_state.json"), *folder.glob("checkpoint-*/trainer_state.json")],
            key=lambda file: _number_of(file.parent),
        )
        if states:
            history = read_json(states[-1]).get("log_history") or []
            records["manifest"] = {**records.get("manifest", {}), "training": history}
    return records


def read_json(file: Path) -> Mapping[str, Any]:
    """Raises InputError if the file is no JSON with a mapping."""
    try:
        content = json_in(file)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{str(file)!r} is not JSON: {error}. Was the run interrupted? Repeat it, or leave it "
            "out of the report."
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{str(file)!r} holds no mapping. Leave that run out of the report.")
    return content


def number(entry: Mapping[str, Any]) -> float | None:
    """The value of an entry of a log; None where it has none."""
    value = entry.get("agg_value")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def interval(entry: Mapping[str, Any]) -> tuple[float, float] | None:
    """The 95 % interval of an entry: the log's, or the percentile bootstrap of a mean over rows.

    Open-Unlearning's logs have none; there the rows' figure is taken whose mean is the value.
    """
    given = entry.get("interval95")
    if isinstance(given, list) and len(given) == 2 and all(isinstance(x, float) for x in given):
        return given[0], given[1]
    scores = _scores(entry)
    if len(scores) < 2 or "interval95" in entry:
        return None
    import numpy as np

    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(scores), size=(RESAMPLES, len(scores)))
    low, high = np.quantile(np.asarray(scores)[drawn].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def score_key(entry: Mapping[str, Any]) -> str | None:
    """Which figure of its rows a metric is the mean of."""
    value = number(entry)
    by_index = entry.get("value_by_index")
    if value is None or not isinstance(by_index, Mapping) or not by_index:
        return None
    first = next((row for row in by_index.values() if isinstance(row, Mapping)), {})
    for key in first:
        scores = _column(by_index, key)
        if scores and math.isclose(fmean(scores), value, rel_tol=1e-5, abs_tol=1e-9):
            return key
    return None


def _scores(entry: Mapping[str, Any]) -> list[float]:
    key = score_key(entry)
    return _column(entry["value_by_index"], key) if key else []


def _column(by_index: Mapping[str, Any], key: str) -> list[float]:
    values = (row.get(key) for row in by_index.values() if isinstance(row, Mapping))
    return [
        float(value)
        for value in values
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    ]


def _log(file: Path) -> dict[str, Mapping[str, Any]]:
    content = read_json(file)
    entries: dict[str, Mapping[str, Any]] = {
        name: entry for name, entry in content.items() if isinstance(entry, dict)
    }
    if not any("agg_value" in entry for entry in entries.values()):
        raise InputError(
            f"{str(file)!r} is no evaluation log: it has no entry with agg_value. "
            "Evaluate that model again, or leave it out."
        )
    return entries


def _read_yaml(file: Path) -> Mapping[str, Any]:
    import yaml

    try:
        text = file.read_text("utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError("it refers to parts of itself, which may stand for any number of them")
        content = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(
            f"{str(file)!r} is not YAML: {error}. Put it right, or leave it out."
        ) from error
    return content if isinstance(content, dict) else {}


def _number_of(checkpoint: Path) -> int:
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else -1


def kinds_of(rows: Iterable[Row]) -> list[str]:
    """The kinds of log that some run has, in the order of a page."""
    there = {kind for row in rows for kind in row.kinds}
    return [kind for kind in KINDS if kind in there]
