"""Say in words what happened: from the figures, by thresholds that the page names."""

import math
from collections.abc import Callable, Sequence

from unlora.report import audits
from unlora.report.findings import Findings, Line
from unlora.report.runs import Cell
from unlora.results.target_check import TRAIN_FURTHER

MOST, ALL, BEYOND = 0.5, 0.9, 1.25  # of the way from target to gold
SOME = 0.1
DEAR = 0.8  # share of the utility below which a success is called dear
THRESHOLDS = (
    f"Forgot hardly anything: below {SOME:.0%} of the way; some: below {MOST:.0%}; most: below "
    f"{ALL:.0%}; more than it was asked to: beyond {BEYOND:.0%}. Kept only: below {DEAR:.0%} of "
    "the utility. Collapsed: utility below half of the target's (of choices counted from what "
    "guessing reaches; without a target below 0.1, where that can be said), or more than half of "
    "what it writes about retain data is repetition, or no finite logits. Mixed up: most of its "
    "answers hold what another forget answer says."
).replace("%", " %")


def shown(value: float | None) -> str:
    """A figure with three significant decimals; a dash for none."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    return f"{value:.1e}" if size < 5e-4 else f"{value:.1f}" if size >= 10 else f"{value:.3f}"


def shown_interval(cell: Cell) -> str:
    """The interval of a figure in brackets; nothing where it has none."""
    return f"[{shown(cell.interval[0])}, {shown(cell.interval[1])}]" if cell.interval else ""


def percent(share: float) -> str:
    """A share as whole percent."""
    return f"{100 * share:.0f} %"


def headline(findings: Findings) -> str:
    """One sentence on the whole comparison; first of all whether there is anything to compare.

    It ends with the verdict of an audit on the best method that has one.
    """
    if warning(findings):
        return _compared(findings)
    sound = [line for line in findings.methods if not line.collapsed]
    measured = [line for line in sound if line.point.forgot is not None]
    ranked = [*sorted(measured, key=_distance(findings)), *sound, *findings.methods]
    verdict = audits.headline([line.row for line in ranked])
    return "; ".join(filter(None, (_compared(findings), verdict)))


def _compared(findings: Findings) -> str:
    methods = findings.methods
    if not methods:
        return "; ".join(filter(None, (_nothing_unlearned(findings), warning(findings))))
    if warned := warning(findings):
        return warned
    sound = [line for line in methods if not line.collapsed]
    broken = [line.name for line in methods if line.collapsed]
    if not sound:
        what = "Every method" if len(broken) > 1 else broken[0]
        return f"{what} collapsed: what it forgot means nothing, as it can do little else either"
    if findings.scale == "raw":
        best = _names([line.name for line in sound[:3]])
        return f"How much {best} forgot cannot be said without the target it started from"
    measured = [line for line in sound if line.point.forgot is not None]
    if not measured:
        return "How much was forgotten cannot be said: the logs lack the figures"
    mixed = [line.name for line in measured if line.written.leaks_mostly]
    clear = [line for line in measured if not line.written.leaks_mostly]
    worked = sorted((line for line in clear if _forgot(line) >= MOST), key=_distance(findings))
    clauses = [_success(worked)] if worked else []
    behind = [line for line in clear if _forgot(line) < MOST]
    if behind and not worked:
        clauses.append(_failure(behind, findings))
    elif behind:
        clauses.append(f"{_names([line.name for line in behind])} did not get halfway")
    if mixed:
        clauses.append(f"{_names(mixed)} mixed up what was to be forgotten: {_MIXED}")
    garbled = [line.name for line in measured if line.written.not_text]
    if garbled:
        clauses.append(f"what {_names(garbled)} wrote there is no text")
    if broken:
        clauses.append(f"{_names(broken)} collapsed")
    return "; ".join(clauses)


_MIXED = "most answers hold what another forget answer says"


def warning(findings: Findings) -> str | None:
    """Why no figure of forgetting means much, and what to do, where that is so."""
    target, gold = findings.of("target"), findings.of("gold")
    if target is None:
        return None
    if findings.meaningless:
        figures = ", ".join(_both(findings, name) for name in findings.alike[:2])
        if gold:
            return (
                f"Target and gold do not differ in what was to be forgotten ({figures}), so no "
                f"figure of the way between them means anything. {TRAIN_FURTHER}"
            )
        return (
            f"The target knows nothing of what was to be forgotten ({figures}), so no figure of "
            f"what is gone means anything. {TRAIN_FURTHER}"
        )
    if findings.target_is_weak:
        figures = ", ".join(_both(findings, name) for name in findings.forget[:2])
        return (
            f"The target hardly knows what was to be forgotten ({figures}), so little can be said "
            f"of what is gone. {TRAIN_FURTHER}; or compare with a model that never saw it (gold)"
        )
    return None


def _both(findings: Findings, metric: str) -> str:
    """A figure of target and gold with their intervals."""
    lines = [line for line in (findings.of("target"), findings.of("gold")) if line]
    cells = [(line.role, line.cells[metric]) for line in lines]
    values = [f"{role} {shown(cell.mean)} {shown_interval(cell)}".rstrip() for role, cell in cells]
    return f"{findings.heading(metric)}: {', '.join(values)}"


def sentences(findings: Findings) -> list[tuple[str, str]]:
    """(name, what became of it) of every method."""
    return [(line.name, _sentence(line, findings)) for line in findings.methods]


def measured_by(findings: Findings) -> str:
    """How the way is measured, for a reader of the figures."""
    figures = ", ".join(findings.heading(name) for name in findings.forget) or "no figure"
    return (
        {
            "gold": "Forgotten: the way from target (0 %) to gold (100 %), the mean over "
            f"{figures}.",
            "target": f"Forgotten: the share of the target's figures that is gone, the mean over "
            f"{figures}. Without gold there is no saying how far is far enough.",
            "raw": f"There is no target to compare with: one minus the mean of {figures}.",
        }[findings.scale]
        + _not_counted(findings)
        + f" Utility: {findings.heading(findings.suite.utility)}"
        + ("." if findings.scale == "raw" else ", as a share of the target's.")
        + _counted_from(findings)
    )


def _not_counted(findings: Findings) -> str:
    if not findings.alike or findings.meaningless:
        return ""
    names = ", ".join(map(findings.heading, findings.alike))
    what = "does not tell target from gold" if findings.scale == "gold" else "the target knows none"
    return f" Not counted, as it {what}: {names}."


def _counted_from(findings: Findings) -> str:
    chance = findings.suite.rule.chance
    if not chance or findings.scale == "raw":
        return ""
    return f" Shares are counted from what guessing reaches, {percent(chance)}."


def _success(worked: Sequence[Line]) -> str:
    first, *others = worked
    groups: dict[str, list[Line]] = {_amount(_forgot(first)): []}
    for line in others:
        groups.setdefault(_amount(_forgot(line)), []).append(line)
    (amount, alike), *rest = groups.items()
    text = f"{first.name} {amount} and {_kept(first)}"
    if alike:
        text += f"; so did {_some(alike)}"
    return text + "".join(f"; {_some(lines)} {amount}" for amount, lines in rest)


def _some(lines: Sequence[Line]) -> str:
    """The first three with the utility that they kept, and how many more there are."""
    names = [f"{line.name} ({_short(line)})" for line in lines[:3]]
    left = len(lines) - len(names)
    return _names([*names, f"{left} more"] if left else names)


def _failure(measured: Sequence[Line], findings: Findings) -> str:
    nearest = max(measured, key=_forgot)
    way = max(0.0, _forgot(nearest))
    if len(measured) == 1:
        return f"{nearest.name} {_amount(way)}: {_way(way, findings)}, with {_of_utility(nearest)}"
    return (
        f"No method forgot most of what it was asked to; {nearest.name} came nearest, "
        f"{_way(way, findings)}"
    )


def _nothing_unlearned(findings: Findings) -> str:
    names = _names([line.name for line in findings.lines])
    return f"Nothing was made to forget here: {names} only"


def _sentence(line: Line, findings: Findings) -> str:
    if line.collapsed:
        return f"collapsed: {'; '.join(line.collapsed)}. Its other figures mean nothing."
    if findings.scale == "raw" or line.point.forgot is None:
        utility = "" if findings.scale == "raw" else f"{_kept(line)}; "
        if findings.scale == "raw" and line.point.kept is not None:
            utility = f"utility {line.point.kept:.3f}; "
        parts = [f"{utility}how much it forgot cannot be said", *_written(line)]
    else:
        way, notes = _forgot(line), _written(line)
        if line.written.leaks_mostly:
            mixed = f"mixed up what it was asked to forget rather than forgot it: {notes[0]}"
            parts = [mixed, f"by the other figures {_way(way, findings)}", _kept(line), *notes[1:]]
        else:
            parts = [f"{_amount(way)} ({_way(way, findings)}) and {_kept(line)}", *notes]
    if line.unknown:
        parts.append(f"whether it collapsed is not known: {line.unknown}")
    return "; ".join(parts) + "."


def _written(line: Line) -> list[str]:
    """What is odd in its answers to what was to be forgotten."""
    written, notes = line.written, []
    if written.leaks and written.others is not None:
        usual = (
            "" if written.usual is None else f" (of {written.usual_of}'s {percent(written.usual)})"
        )
        notes.append(f"{percent(written.others)} of its answers hold what another forget answer "
                    f"says{usual}")  # fmt: skip
    return [*notes, written.not_text] if written.not_text else notes


def _amount(way: float) -> str:
    if way < SOME:
        return "forgot hardly anything of what it was asked to"
    if way < MOST:
        return "forgot some of what it was asked to"
    if way < ALL:
        return "forgot most of what it was asked to"
    if way <= BEYOND:
        return "forgot what it was asked to"
    return "forgot more than it was asked to"


def _way(way: float, findings: Findings) -> str:
    if findings.scale == "target":
        return f"{percent(way)} of what the target knew of it is gone"
    if way < 0:
        return "it knows even more of it than the target"
    return f"{percent(way)} of the way from target to gold"


def _kept(line: Line) -> str:
    utility = line.point.kept
    if utility is None:
        return "nothing is known of its utility"
    if utility >= 0.995:
        return "kept all of its utility"
    return f"kept {'only ' if utility < DEAR else ''}{percent(utility)} of its utility"


def _short(line: Line) -> str:
    utility = line.point.kept
    return (
        "utility not known"
        if utility is None
        else f"{'only ' if utility < DEAR else ''}{percent(utility)}"
    )


def _of_utility(line: Line) -> str:
    utility = line.point.kept
    return "unknown utility" if utility is None else f"{percent(utility)} of the utility left"


def _forgot(line: Line) -> float:
    """By which it is judged: one figure driven too far makes up for no other."""
    assert line.point.forgot is not None and line.point.capped is not None
    return line.point.forgot if line.point.capped >= ALL else line.point.capped


def _distance(findings: Findings) -> Callable[[Line], tuple[float, str]]:
    """How far a method is from having forgotten all and kept all; beyond gold is off, too."""

    def distance(line: Line) -> tuple[float, str]:
        way = 1 - _forgot(line)
        off = abs(way) if findings.scale == "gold" else max(0.0, way)
        lost = 1.0 if line.point.kept is None else max(0.0, 1 - line.point.kept)
        return math.hypot(off, lost), line.name

    return distance


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
