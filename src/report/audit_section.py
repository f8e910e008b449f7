"""Show on the page what audits and dials found, where a run has one."""

from collections.abc import Sequence
from typing import Any

from unlora.report import audit_figures, audits
from unlora.report.audit_figures import decimal
from unlora.report.audits import Bar
from unlora.report.runs import Row
from unlora.report.summary import shown, shown_interval
from unlora.results.dial_log import DialLog

GOALS = {
    "audit": "the least change that holds under attack",
    "plain": "the least change after which nothing is left where it is asked plainly",
}


def holds(rows: Sequence[Row]) -> dict[str, Any] | None:
    """The section on attacks; None where no run was audited."""
    from markupsafe import Markup

    audited = [row for row in rows if audits.audits(row)]
    if not audited:
        return None
    runs, relearnt = [], []
    for i, row in enumerate(audited):
        bars, baseline = audits.bars(row), audits.baseline([row])
        svg = audit_figures.attacks(bars, audits.most(row), baseline, f"attacks-{i}")
        runs.append({
            "name": row.name,
            "verdict": audits.shown_verdict(row),
            "sentences": audits.sentences(row),
            "svg": Markup(svg),
            "words": _bar_words(row.name, bars),
        })  # fmt: skip
        if relearning := audits.relearning(row):
            relearnt.append({
                "name": row.name,
                "attack": relearning.attack,
                "rate": f"{relearning.rate:g}",
                "svg": Markup(audit_figures.relearnt(relearning, f"relearnt-{i}")),
                "words": f"Mean log-probability of the answers of {row.name} by step: "
                + _points(relearning.means["unlearned"]),
            })  # fmt: skip
    return {
        "introduction": audits.INTRODUCTION,
        "legend": legend(audited),
        "runs": runs,
        "relearnt": relearnt,
        "forms": _forms(audited),
        "seeds": any(len(row.results) > 1 for row in audited),
    }


def legend(rows: Sequence[Row]) -> str:
    """How the bars are read."""
    several = any(len(row.results) > 1 for row in rows)
    never = audits.baseline(rows)
    return (
        f"0: {never}; 1: as before; below 0: less likely than to {never}. Of each attack the form "
        "that brings back most, with its 95 % interval over the rows"
        + (", means over seeds" if several else "")
        + ". Bars whose interval reaches beyond what a verdict of held allows stand out; what is "
        f"grey has no part in the verdict. Thresholds: {audits.thresholds(rows)}."
    )


def dials(rows: Sequence[Row]) -> dict[str, Any] | None:
    """The section on scaled adapters; None where no run was dialled."""
    from markupsafe import Markup

    with_dial = [row for row in rows if any(result.dial for result in row.results)]
    if not with_dial:
        return None
    sentences = [(row.name, _dial_sentence(row)) for row in with_dial]
    return {
        "svg": Markup(audit_figures.dials(with_dial)),
        "words": "What is left against the answers to keep: "
        + "; ".join(f"{name} {sentence}" for name, sentence in sentences),
        "farthest": f"{audit_figures.FARTHEST:g}",
        "sentences": sentences,
    }


def _dial_sentence(row: Row) -> str:
    several = len(row.results) > 1
    return " ".join(
        (f"Seed {result.entry.seed}: " if several else "") + _dialled(result.dial)
        for result in row.results
        if result.dial
    )


def _dialled(dial: DialLog) -> str:
    goal = str(dial.content.get("to", "audit"))
    goal = GOALS.get(goal, goal)
    missed = f"no scale does what was asked for: {goal}"
    if dial.scale is None:
        return f"{missed}."
    text = f"scale {dial.scale:.2f}, " + (goal if dial.reached else f"though {missed}")
    if dial.chosen:
        residual, retain = dial.chosen
        text += f": {decimal(residual)} is left, answers to keep at {retain:.3f}"
    verdict = dial.content.get("verdict")
    return f"{text}. {verdict['sentence']}" if verdict and dial.reached else f"{text}."


def _forms(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every form of every attack that was run, and those that were not."""
    forms: list[dict[str, Any]] = []
    for row in rows:
        for result, log in audits.audits(row):
            of = {"run": row.name, "seed": result.entry.seed}
            for form in log.attacks:
                bounds = form.get("interval95")
                forms.append({
                    **of, "name": form["name"], "value": shown(form["residual"]),
                    "interval": bounds and "[{}, {}]".format(*map(shown, bounds)),
                    "why_not": audits.why_not(form),
                })  # fmt: skip
            for name, why in log.not_run.items():
                forms.append({**of, "name": name, "value": shown(None), "interval": None,
                              "why_not": f"not run: {why}"})  # fmt: skip
    return forms


def _bar_words(name: str, bars: Sequence[Bar]) -> str:
    """What the bars show, for who does not see them."""
    counted = [
        f"{bar.words} {decimal(bar.value)}"
        for bar in bars
        if not bar.why_not and bar.value is not None
    ]
    return f"What attacks bring back of what {name} was to forget: {'; '.join(counted)}."


def _points(points: Sequence[tuple[int, float]]) -> str:
    return ", ".join(f"{step}: {value:.2f}" for step, value in points) + "."


def table_cells(row: Row) -> list[dict[str, Any]]:
    """What the table of figures shows of a run's audit."""
    return [
        {
            "value": shown(cell.mean),
            "interval": shown_interval(cell),
            "seeds": [shown(value) for value in cell.seeds],
            "note": cell.note,
        }
        for cell in audits.cells(row).values()
    ]
