"""What happened, in words: from the figures, by thresholds that the page names."""

import math
from collections.abc import Callable, Sequence

from unlora.report.findings import Findings, Line

MOST, ALL, BEYOND = 0.5, 0.9, 1.25  # of the way from target to gold
SOME = 0.1
DEAR = 0.8  # share of the utility below which a success is called dear
THRESHOLDS = (
    f"Forgot hardly anything: below {SOME:.0%} of the way; some: below {MOST:.0%}; most: below "
    f"{ALL:.0%}; more than it was asked to: beyond {BEYOND:.0%}. Kept only: below {DEAR:.0%} of "
    "the utility. Collapsed: utility below half of the target's (without a target below 0.1), or "
    "more than half of what it writes about retain data is repetition, or no finite logits."
).replace("%", " %")


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def headline(findings: Findings) -> str:
    """One sentence on the whole comparison."""
    methods = findings.methods
    if not methods:
        return _nothing_unlearned(findings)
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
        why = "the logs lack the figures, or target and gold are alike"
        return f"How much was forgotten cannot be said: {why}"
    worked = sorted((line for line in measured if _forgot(line) >= MOST), key=_distance(findings))
    clauses = [_success(worked, findings)] if worked else [_failure(measured, findings)]
    behind = [line.name for line in measured if _forgot(line) < MOST]
    if worked and behind:
        clauses.append(f"{_names(behind)} did not get halfway")
    if broken:
        clauses.append(f"{_names(broken)} collapsed")
    return "; ".join(clauses)


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
        + f" Utility: {findings.heading(findings.suite.utility)}"
        + ("." if findings.scale == "raw" else ", as a share of the target's.")
    )


def _success(worked: Sequence[Line], findings: Findings) -> str:
    first, *others = worked
    text = f"{first.name} {_amount(_forgot(first))} and {_kept(first)}"
    if others:
        text += "; so did " if all(_forgot(o) >= MOST for o in others) else ""
        shown = [f"{o.name} ({_short(o)})" for o in others[:3]]
        left = len(others) - 3
        text += _names([*shown, f"{left} more"] if left > 0 else shown)
    return text


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
        kept = "" if line.point.kept is None else f"utility {line.point.kept:.3f}; "
        return f"{kept}how much it forgot cannot be said."
    way = _forgot(line)
    return f"{_amount(way)} ({_way(way, findings)}) and {_kept(line)}."


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
    kept = line.point.kept
    if kept is None:
        return "nothing is known of its utility"
    if kept >= 0.995:
        return "kept all of its utility"
    return f"kept {'only ' if kept < DEAR else ''}{percent(kept)} of its utility"


def _short(line: Line) -> str:
    kept = line.point.kept
    return (
        "utility not known" if kept is None else f"{'only ' if kept < DEAR else ''}{percent(kept)}"
    )


def _of_utility(line: Line) -> str:
    kept = line.point.kept
    return "unknown utility" if kept is None else f"{percent(kept)} of the utility left"


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
