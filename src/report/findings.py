"""Compare runs: how far each forgot, what it kept, which one is best at what."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from unlora.report.runs import Cell, Entry, Row, kinds_of, read_rows
from unlora.report.suites import SUITES, Aim, Suite, aim, end
from unlora.report.written import Written, written
from unlora.results.collapse import Verdict
from unlora.results.target_check import hardly_knows, told_apart

THRESHOLDS = ("utility_share", "utility_floor", "max_repetition")


@dataclass(frozen=True)
class Point:
    """Where a run stands between target and gold.

    Attributes:
        forgot: with target and gold the share of the way from target (0) to gold (1), above 1
            beyond gold; with the target alone the share of its forget figures that is gone, of
            choices the share of what is above guessing; without one minus their mean.
        capped: the same without what goes beyond: too much of one figure makes up for no other.
        kept: utility as a share of the target's, of choices of what is above guessing; the
            utility itself where that is not known.
    """

    forgot: float | None
    capped: float | None
    kept: float | None
    seed: int | None = None


@dataclass(frozen=True)
class Line:
    """One row of the table and what follows from it.

    Attributes:
        collapsed: why it is called so; empty for a sound model.
        unknown: why nobody can say whether it collapsed, where that is so.
        written: what it writes about the data to be forgotten.
    """

    row: Row
    cells: Mapping[str, Cell]
    point: Point
    seeds: tuple[Point, ...]
    collapsed: tuple[str, ...]
    best: frozenset[str]
    unknown: str | None = None
    written: Written = Written()

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def role(self) -> str:
        return self.row.role


@dataclass(frozen=True)
class Findings:
    """All runs that have one kind of log.

    Attributes:
        scale: what ``Point.forgot`` is: ``gold`` the way to gold, ``target`` the share gone,
            ``raw`` one minus the figures.
        forget: the figures that it is measured by.
        alike: forget figures that do not tell the target from gold (without gold: from one that
            knows nothing), so that no way between them can be measured.
        target_is_weak: with the target alone, whether it hardly knows what is to be forgotten.
    """

    kind: str
    suite: Suite
    lines: tuple[Line, ...]
    main: tuple[str, ...]
    others: tuple[str, ...]
    aims: Mapping[str, Aim | None]
    scale: str
    forget: tuple[str, ...]
    alike: tuple[str, ...] = ()
    target_is_weak: bool = False

    @property
    def meaningless(self) -> bool:
        """Whether nothing tells target and gold apart: no figure of a way means anything then."""
        return not self.forget and bool(self.alike)

    @property
    def methods(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if line.role == "method")

    def of(self, role: str) -> Line | None:
        return next((line for line in self.lines if line.role == role), None)

    def note(self, metric: str) -> str:
        """What a reader should know of a figure of any run."""
        if metric not in self.alike:
            return ""
        what = "target and gold do not differ" if self.scale == "gold" else "the target knows none"
        return f"says nothing about forgetting: {what}"

    def heading(self, metric: str) -> str:
        return self.suite.main.get(metric, metric)


@dataclass(frozen=True)
class Comparison:
    """Runs, and what they came to by each kind of log."""

    rows: tuple[Row, ...]
    findings: tuple[Findings, ...]


def compare(entries: Sequence[Entry]) -> Comparison:
    """Read runs and compare them.

    Raises:
        InputError: see :func:`unlora.report.runs.read_rows`.
    """
    rows = tuple(read_rows(entries))
    return Comparison(rows, tuple(find(rows, kind) for kind in kinds_of(rows)))


def find(rows: Sequence[Row], kind: str) -> Findings:
    """What the runs with this kind of log came to."""
    suite = SUITES[kind]
    rows = [row for row in rows if kind in row.kinds]
    names = sorted(
        {n for row in rows for result in row.results for n in result.run.logs.get(kind, ())}
    )
    cells = {row.name: {name: row.cell(kind, name) for name in names} for row in rows}
    valued = [
        n for n in names if any(c[n].mean is not None or any(c[n].seeds) for c in cells.values())
    ]
    main = [name for name in suite.main if name in valued]
    target, gold = (next((r for r in rows if r.role == role), None) for role in ("target", "gold"))
    scale = "raw" if target is None else "target" if gold is None else "gold"
    # an attack has no zero: what it reaches on a model that never saw the data is gold's to say
    forget = [n for n in suite.forget if n in valued and (scale == "gold" or n[:4] != "mia_")]
    forget, alike = _telling(forget, cells, target, gold, suite.rule.chance)
    way = _Way(kind, suite, cells, target, gold, tuple(forget))
    config = _suite_config(rows, kind)
    aims = {
        name: _without_gold(name, aim(name, config)) if gold is None else aim(name, config)
        for name in names
    }
    of_gold = cells[gold.name] if gold else {}
    verdicts = {row.name: _verdict(row, kind, suite, cells, target) for row in rows}
    broken = {name: verdict.reasons for name, verdict in verdicts.items()}
    silent = {*alike, *(n for n in names if not forget and alike and aims[n] in ("gold", "zero"))}
    best = _best(rows, cells, {n: None if n in silent else a for n, a in aims.items()}, of_gold,
                 broken)  # fmt: skip

    lines = [
        Line(
            row,
            cells[row.name],
            way.point(row),
            tuple(way.point(row, i) for i in range(len(row.results)) if len(row.results) > 1),
            broken[row.name],
            frozenset(name for name in names if row.name in best[name]),
            verdicts[row.name].unknown,
            written(row, kind, suite, gold or target),
        )
        for row in rows
    ]
    others = tuple(name for name in names if name not in main)
    return Findings(
        kind, suite, tuple(lines), tuple(main), others, aims, scale, tuple(forget), tuple(alike),
        scale == "target" and target is not None and _is_weak(target, kind),
    )  # fmt: skip


def _telling(
    forget: Sequence[str],
    cells: Mapping[str, Mapping[str, Cell]],
    target: Row | None,
    gold: Row | None,
    chance: float,
) -> tuple[list[str], list[str]]:
    """The forget figures that tell the target from gold, and those that do not."""
    if target is None:
        return [*forget], []
    far = Cell(chance, interval=(chance, chance))
    of = {n: (cells[target.name][n], cells[gold.name][n] if gold else far) for n in forget}
    alike = [n for n, pair in of.items() if None not in (pair[0].mean, pair[1].mean)]
    alike = [n for n in alike if not _apart(*of[n])]
    return [n for n in forget if n not in alike and (not gold or _apart(*of[n]))], alike


@dataclass(frozen=True)
class _Way:
    """The way from target to gold, along which a run is placed by the ``forget`` figures."""

    kind: str
    suite: Suite
    cells: Mapping[str, Mapping[str, Cell]]
    target: Row | None
    gold: Row | None
    forget: tuple[str, ...]

    def point(self, row: Row, seed: int | None = None) -> Point:
        """Place a run, or one seed of it."""
        number = None if seed is None else row.results[seed].entry.seed

        def value(of: Row | None, metric: str) -> float | None:
            """Of the same seed where there is one, else the mean."""
            if of is None:
                return None
            for i, result in enumerate(of.results):
                if seed is not None and (i == seed if of is row else result.entry.seed == number):
                    return result.run.entry(self.kind, metric).value
            return self.cells[of.name].get(metric, Cell()).mean

        target, chance, utility = self.target, self.suite.rule.chance, self.suite.utility
        ends = [(value(target, m), value(self.gold, m) if self.gold else chance)
                for m in self.forget]  # fmt: skip
        shares = [_share(value(row, m), *both) for m, both in zip(self.forget, ends, strict=True)]
        known = [share for share in shares if share is not None]
        left = value(row, utility)
        if target is not None:
            left = _kept(left, value(target, utility), chance)
        if not known or len(known) < len(shares):
            return Point(None, None, left, number)
        return Point(fmean(known), fmean(min(share, 1.0) for share in known), left, number)


def _apart(target: Cell, gold: Cell) -> bool:
    return told_apart(target.mean, gold.mean, target.interval, gold.interval)


def _is_weak(target: Row, kind: str) -> bool:
    """Whether a target hardly knows what is to be forgotten, by its answers to each row."""
    probabilities = target.scores(kind, "forget_Q_A_Prob", "prob")
    suffixes = target.scores(kind, "extraction_strength", "score")
    by_heart = [share == 1 for share in suffixes]
    return bool(by_heart and probabilities) and hardly_knows(fmean(probabilities), by_heart)


def _without_gold(name: str, best: Aim | None) -> Aim | None:
    return end(name) if best == "gold" else best


def _suite_config(rows: Sequence[Row], kind: str) -> Mapping[str, Any]:
    """The section of the suite in the first config that has one."""
    for row in rows:
        for result in row.results:
            for name in ("eval_config", "run_config"):
                suites = result.run.records.get(name, {}).get("eval")
                for key, section in suites.items() if isinstance(suites, Mapping) else ():
                    if key.upper() == kind and isinstance(section, Mapping):
                        return section
    return {}


def _verdict(
    row: Row, kind: str, suite: Suite, cells: Mapping[str, Mapping[str, Cell]], target: Row | None
) -> Verdict:
    """Whether a run collapsed, by the thresholds that its evaluation was given."""
    if row.role == "target" or suite.utility not in cells[row.name]:
        return Verdict()
    metrics = _suite_config([row], kind).get("metrics")
    declared = metrics.get("collapsed") if isinstance(metrics, Mapping) else None
    settings = {
        name: value
        for name, value in (declared if isinstance(declared, Mapping) else {}).items()
        if name in THRESHOLDS and isinstance(value, (int, float))
    }

    def mean(of: Row, metric: str) -> float:
        value = cells[of.name].get(metric, Cell()).mean
        return math.nan if value is None else value

    return replace(suite.rule, **settings).judge(
        mean(row, suite.utility),
        mean(row, suite.repetition),
        mean(target, suite.utility) if target else None,
        row.count(kind, suite.utility, "unscored"),
    )


def _best(
    rows: Sequence[Row],
    cells: Mapping[str, Mapping[str, Cell]],
    aims: Mapping[str, Aim | None],
    gold: Mapping[str, Cell],
    broken: Mapping[str, tuple[str, ...]],
) -> dict[str, set[str]]:
    """metric -> the methods that are best at it, of those that did not collapse."""
    sound = [row.name for row in rows if row.role == "method" and not broken[row.name]]
    best: dict[str, set[str]] = {}
    for metric, wanted in aims.items():
        values = {name: cells[name][metric].mean for name in sound}
        known = {name: value for name, value in values.items() if value is not None}
        goal = gold[metric].mean if wanted == "gold" and metric in gold else 0.0
        if wanted is None or goal is None or len(known) < 2:
            best[metric] = set()  # nothing to be better than
            continue
        distance = {
            name: -value if wanted == "high" else value if wanted == "low" else abs(value - goal)
            for name, value in known.items()
        }
        least = min(distance.values())
        tied = {name for name, value in distance.items() if value - least < 1e-12}
        best[metric] = tied if len(tied) < len(known) else set()
    return best


def _share(value: float | None, target: float | None, goal: float | None) -> float | None:
    if value is None:
        return None
    if target is None:
        return 1 - value
    return (target - value) / (target - goal) if goal is not None and target != goal else None


def _kept(utility: float | None, before: float | None, chance: float) -> float | None:
    if utility is None or before is None or before <= chance:
        return None
    return max(0.0, utility - chance) / (before - chance)
