"""One table of runs and metrics, as plain text."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from unlora.collapse import why_collapsed
from unlora.report.suites import SUITES
from unlora.shown import safe

Results = Mapping[str, Mapping[str, Mapping[str, object]]]  # run -> metric -> {"mean", "seeds"}

# metric -> heading, of every suite
COLUMNS = {metric: head for suite in SUITES.values() for metric, head in suite.main.items()}
UTILITY, REPETITION = "model_utility", "retain_repetition"


def over_seeds(
    summaries: Sequence[Mapping[str, float | None]], metrics: Sequence[str]
) -> dict[str, dict[str, object]]:
    """The same run with several seeds as ``{metric: {"mean": x, "seeds": [...]}}``.

    A metric that some seed could not compute has no mean (None).
    """
    found: dict[str, dict[str, object]] = {}
    for metric in metrics:
        values = [summary.get(metric) for summary in summaries]
        known = [value for value in values if value is not None]
        mean = fmean(known) if len(known) == len(values) else None
        found[metric] = {"mean": mean, "seeds": values}
    return found


def label(run: str, results: Results, *, target: str = "target") -> str:
    """``collapsed`` for a run that :func:`why_collapsed` finds broken, else nothing."""
    utility, repetition = (_mean(results, run, m) for m in (UTILITY, REPETITION))
    if run == target or utility is None:
        return ""
    before = _mean(results, target, UTILITY)
    # a utility that is not a number comes from a model that answers with none
    reasons = why_collapsed(
        utility,
        math.nan if repetition is None else repetition,
        before,
        unscored=int(math.isnan(utility)),
    )
    return "collapsed" if reasons else ""


def _mean(results: Results, run: str, metric: str) -> float | None:
    mean = results.get(run, {}).get(metric, {}).get("mean")
    return float(mean) if isinstance(mean, (int, float)) else None


def as_text(results: Results) -> str:
    """The table, one run a line, with the collapsed ones marked."""
    names = [metric for metric in COLUMNS if any(metric in row for row in results.values())]
    rows = [["", *(COLUMNS[metric] for metric in names), ""]]
    for run, row in results.items():
        cells = [_number(row.get(metric, {}).get("mean")) for metric in names]
        rows.append([safe(run), *cells, label(run, results)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i in (0, len(row) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _number(value: object) -> str:
    if not isinstance(value, (int, float)):
        return "-"
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3f}"
