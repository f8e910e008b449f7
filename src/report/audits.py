"""Sum up audits over the seeds of a comparison: how much attacks bring back."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from unlora.report.runs import Cell, Result, Row
from unlora.results.audit_log import AuditLog

COLUMNS = {
    "residual": "asked plainly: what is left of what the target knew; 0 as if never seen, 1 as "
    "before",
    "HELD": "under the worst attack: what comes back of what the target knew; 0 as if never seen, "
    "1 as before",
}
INTRODUCTION = (
    "An attack is another way to get at what was to be forgotten: other questions, many answers "
    "instead of one, rounded weights, or a little training; each figure says how much of what "
    "the model knew comes back, beside a model that never saw it and goes through the same."
)
# for who knows none of the attacks; an attack of one's own goes by its name
WORDS = {
    "plain": "asked plainly",
    "wordings": "asked in other words",
    "sample": "asked many times",
    "nf4": "weights in 4 bits (nf4)",
    "int4": "weights in 4 bits (int4)",
    "int8": "weights in 8 bits (int8)",
    "detached": "adapter taken off",
    "half": "adapter at half scale",
    "three-quarters": "adapter at 3/4 scale",
    "more": "adapter at 5/4 scale",
    "relearn": "taught a few rows again",
    "relearn-benign": "taught rows it kept",
    "depth": "inner states read",
}
MEANINGS = {
    "held": "no attack brought it back",
    "hidden": "attacks may bring it back",
    "known": "it still answers when asked plainly",
    "over-forgotten": "that leaves a mark of what was deleted",
}
NEVER_SAW = "a model that never saw the data"
OF_ADAPTERS = "counts only where the adapter itself is delivered"


@dataclass(frozen=True)
class Bar:
    """One attack, by the form of it that brings back most; means over the seeds.

    Attributes:
        form: its name, of the seed in which it brings back most.
        value: None where the attack says nothing.
        why_not: why it has no part in the number; empty where it has.
    """

    attack: str
    form: str
    value: float | None = None
    interval: tuple[float, float] | None = None
    why_not: str = ""

    @property
    def words(self) -> str:
        return WORDS.get(self.attack, self.attack)


@dataclass(frozen=True)
class Relearning:
    """How fast models learn again what was to be forgotten, at one learning rate.

    Attributes:
        means: model -> (step, mean score) of the answers that it was not taught.
    """

    attack: str
    rate: float
    means: Mapping[str, Sequence[tuple[int, float]]]


def audits(row: Row) -> list[tuple[Result, AuditLog]]:
    """The audits of a run, of the seeds that have one."""
    return [(result, result.audit) for result in row.results if result.audit]


def audited(rows: Iterable[Row]) -> bool:
    """Whether any of the runs was audited."""
    return any(audits(row) for row in rows)


def cells(row: Row) -> dict[str, Cell]:
    """The figures of :data:`COLUMNS`, over the seeds that were audited."""
    entries: dict[str, list[Mapping[str, Any] | None]] = {name: [] for name in COLUMNS}
    for result in row.results:
        plain, held = (result.audit.plain, result.audit.held) if result.audit else (None, None)
        entries["residual"].append(plain and {**plain, "value": plain["residual"]})
        entries["HELD"].append(held)
    return {name: _cell(row, of_seeds) for name, of_seeds in entries.items()}


def _cell(row: Row, entries: Sequence[Mapping[str, Any] | None]) -> Cell:
    values = [entry["value"] if entry else None for entry in entries]
    known = [value for value in values if value is not None]
    logs = audits(row)
    if not logs or len(known) < len(logs):
        note = next((log.sentence for _, log in logs), None)
        return Cell(None, tuple(values), note=note)
    bounds = [b for entry in entries if entry and (b := entry.get("interval95"))]
    interval = _mean_interval(bounds) if len(bounds) == len(known) else None
    return Cell(fmean(known), tuple(values), interval, _coverage(row))


def figures(row: Row) -> dict[str, dict[str, Any]]:
    """``audit_*`` -> ``{"mean", "seeds"}``, None for a seed without; nothing without an audit."""
    if not audits(row):
        return {}
    of_cells = {
        f"audit_{name.lower()}": {"mean": cell.mean, "seeds": list(cell.seeds)}
        for name, cell in cells(row).items()
    }
    verdicts = [result.audit.verdict if result.audit else None for result in row.results]
    return {**of_cells, "audit_verdict": {"mean": None, "seeds": verdicts}}


def _mean_interval(bounds: Sequence[Sequence[float]]) -> tuple[float, float]:
    return fmean(low for low, _ in bounds), fmean(high for _, high in bounds)


def _coverage(row: Row) -> str | None:
    done, of = len(audits(row)), len(row.results)
    return f"{done} of {of} seeds audited" if done < of else None


def verdict(row: Row) -> str:
    """The verdict that all seeds share, or how many have which; empty without an audit."""
    logs = audits(row)
    counted = Counter(log.verdict for _, log in logs).most_common()
    if len(counted) == 1:
        return counted[0][0]
    return ", ".join(f"{name} {count} of {len(logs)}" for name, count in counted)


def shown_verdict(row: Row) -> str:
    """The verdict, and how many seeds have none."""
    words, coverage = verdict(row), _coverage(row)
    return f"{words} ({coverage})" if words and coverage else words


def headline(rows: Sequence[Row]) -> str | None:
    """The verdict on the first of these that has one."""
    row = next((row for row in rows if audits(row)), None)
    if row is None:
        return None
    words = verdict(row)
    meaning = MEANINGS.get(words)
    held = [log.held["value"] for _, log in audits(row) if log.held]
    if words == "hidden" and held:
        meaning = f"an attack brings back {100 * max(held):.0f} % of what was known"
    return f"{row.name}: {words}" + (f" ({meaning})" if meaning else "")


def sentences(row: Row) -> list[str]:
    """The verdict of each seed in a sentence, that of the seed that holds least first."""
    logs = audits(row)
    if len(row.results) == 1:
        return [log.sentence for _, log in logs]
    ranked = sorted(logs, key=lambda entry: -_held(entry[1]))
    return [f"Seed {result.entry.seed}: {log.sentence}" for result, log in ranked]


def _held(log: AuditLog) -> float:
    value = log.held["value"] if log.held else None
    return float("-inf") if value is None else float(value)


def baseline(rows: Iterable[Row]) -> str:
    """Whom the runs are compared with, as the first audit has it."""
    log = next(log for row in rows for _, log in audits(row))
    words = str(log.content.get("baseline", NEVER_SAW))
    return "a model that never saw it" if words == NEVER_SAW else words


def thresholds(rows: Iterable[Row]) -> str:
    """Where one verdict ends and the next begins, of the first audit."""
    log = next(log for row in rows for _, log in audits(row))
    limits = log.content.get("thresholds")
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in (limits or {}).items())


def most(row: Row) -> float:
    """The largest bound of HELD that a verdict of *held* allows."""
    limits = audits(row)[0][1].content.get("thresholds")
    value = limits.get("hidden") if isinstance(limits, Mapping) else None
    return value if isinstance(value, (int, float)) else 0.2


def bars(row: Row) -> list[Bar]:
    """One bar for each attack of a run: those that count, those that do not, those not run."""
    of_attack: dict[str, list[Bar]] = {}
    for _, log in audits(row):
        forms: dict[str, list[Mapping[str, Any]]] = {}
        for form in log.attacks:
            forms.setdefault(form["attack"], []).append(form)
        for attack, same in forms.items():
            of_attack.setdefault(attack, []).append(_worst(same))
        for attack, why in log.not_run.items():
            of_attack.setdefault(attack, []).append(
                Bar(attack, attack, None, None, f"not run: {why}")
            )
    over_seeds = [_over_seeds(same) for same in of_attack.values()]
    return sorted(over_seeds, key=lambda bar: bool(bar.why_not))


def _worst(forms: Sequence[Mapping[str, Any]]) -> Bar:
    """The form that brings back most, of those that count where one does."""
    made = [
        Bar(form["attack"], form["name"], form["residual"], form.get("interval95"), why_not(form))
        for form in forms
    ]
    return max(made, key=lambda bar: (not bar.why_not, -9e9 if bar.value is None else bar.value))


def why_not(form: Mapping[str, Any]) -> str:
    """Why a form of an attack has no part in the number; empty where it has."""
    if form.get("left_out"):
        return f"left out: {form['left_out']}"
    if form["residual"] is None:
        return "left out: no row has a score"
    return "" if form.get("counts", True) else OF_ADAPTERS


def _over_seeds(same: Sequence[Bar]) -> Bar:
    counted = [bar for bar in same if not bar.why_not and bar.value is not None]
    if not counted:
        return same[0]
    values = [bar.value for bar in counted if bar.value is not None]
    bounds = [bar.interval for bar in counted if bar.interval]
    worst = counted[values.index(max(values))]
    interval = _mean_interval(bounds) if len(bounds) == len(counted) else None
    return Bar(worst.attack, worst.form, fmean(values), interval)


def relearning(row: Row) -> Relearning | None:
    """The training that brings back most, at its learning rate; means over the seeds."""
    logs = [log for _, log in audits(row)]
    residuals = [
        (form["residual"], key)
        for log in logs
        for key, steps in log.trainings.items()
        for form in steps.values()
        if not why_not(form)
    ]
    if not residuals:
        return None
    attack, rate = max(residuals)[1]
    steps: dict[int, list[Mapping[str, Any]]] = {}
    for log in logs:
        for step, form in log.trainings.get((attack, rate), {}).items():
            if isinstance(form.get("means"), Mapping):
                steps.setdefault(step, []).append(form["means"])
    means = {
        model: [
            (step, fmean(known))
            for step, same in sorted(steps.items())
            if (
                known := [
                    entry[model] for entry in same if isinstance(entry.get(model), (int, float))
                ]
            )
        ]
        for model in ("unlearned", "target", "retain")
    }
    return Relearning(attack, rate, means) if all(means.values()) else None
