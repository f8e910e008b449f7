"""Read runs for a report: seeds of one name are one row."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from unlora.errors import InputError
from unlora.results.audit_log import AuditLog, read_audit
from unlora.results.dial_log import DialLog, read_dial
from unlora.results.eval_log import KINDS, LogEntry
from unlora.results.run_result import RunResult, find_logs, read_run

Role = Literal["target", "gold", "method"]


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
    """What one run left, and which run of the page it is.

    Attributes:
        audit: None where it was not audited; so with ``dial``.
    """

    entry: Entry
    run: RunResult
    audit: AuditLog | None = None
    dial: DialLog | None = None


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
        return {kind for result in self.results for kind in result.run.logs}

    def entries(self, kind: str, metric: str) -> list[LogEntry]:
        """The entry of each seed."""
        return [result.run.entry(kind, metric) for result in self.results]

    def cell(self, kind: str, metric: str) -> Cell:
        """A metric over the seeds; without a mean where a seed has no value."""
        entries = self.entries(kind, metric)
        values = [entry.value for entry in entries]
        known = [value for value in values if value is not None]
        bounds = [bound for entry in entries if (bound := entry.interval) is not None]
        return Cell(
            fmean(known) if known and len(known) == len(values) else None,
            tuple(values),
            (fmean(low for low, _ in bounds), fmean(high for _, high in bounds))
            if bounds and len(bounds) == len(values)
            else None,
            next((entry.reason for entry in entries if entry.reason), None),
        )

    def figures(self) -> dict[str, dict[str, Any]]:
        """metric -> ``{"mean", "seeds"}``, of all that some seed has computed."""
        computed = {
            (metric, kind)
            for result in self.results
            for kind, log in result.run.logs.items()
            for metric, entry in log.items()
            if not entry.content.get("not_computed")
        }
        cells = {metric: self.cell(kind, metric) for metric, kind in sorted(computed)}
        return {name: {"mean": c.mean, "seeds": list(c.seeds)} for name, c in cells.items()}

    def scores(self, kind: str, metric: str, key: str) -> list[float]:
        """A figure of every question, of all seeds."""
        return [score for entry in self.entries(kind, metric) for score in entry.column(key)]

    def count(self, kind: str, metric: str, key: str) -> int:
        """The sum over the seeds of a count in the log, such as ``unscored``."""
        counts = (entry.content.get(key) for entry in self.entries(kind, metric))
        return sum(count for count in counts if isinstance(count, int))


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
    if not find_logs(entry.folder):
        raise InputError(
            f"The folder {str(entry.folder)!r} holds no evaluation log ({', '.join(KINDS)}: "
            "<kind>_EVAL.json), neither directly nor in evals/ or a checkpoint's. "
            f"Evaluate the model first: unlora eval ... model={entry.folder}"
        )
    return Result(entry, read_run(entry.folder), read_audit(entry.folder), read_dial(entry.folder))


def kinds_of(rows: Iterable[Row]) -> list[str]:
    """The kinds of log that some run has, in the order of a page."""
    there = {kind for row in rows for kind in row.kinds}
    return [kind for kind in KINDS if kind in there]
