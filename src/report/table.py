"""One table of runs and metrics, as plain text."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from unlora.report import summary as words
from unlora.report.findings import Findings
from unlora.report.suites import SUITES
from unlora.runs.redaction import safe

Results = Mapping[str, Mapping[str, Mapping[str, object]]]  # run -> metric -> {"mean", "seeds"}

# metric -> heading, of every suite
COLUMNS = {metric: head for suite in SUITES.values() for metric, head in suite.main.items()}


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


def as_text(results: Results, findings: Sequence[Findings]) -> str:
    """The table, one run a line, with the collapsed ones marked.

    Above it stands why no figure of forgetting means anything, where that is so.
    """
    names = [metric for metric in COLUMNS if any(metric in row for row in results.values())]
    rows = [["", *(COLUMNS[metric] for metric in names), ""]]
    for run, row in results.items():
        cells = [_number(row.get(metric, {}).get("mean")) for metric in names]
        rows.append([safe(run), *cells, _label(run, findings)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i in (0, len(row) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    table = "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
    return "\n\n".join([*warnings(findings), table])


def warnings(findings: Sequence[Findings]) -> list[str]:
    """Of each benchmark why its figures of forgetting mean little, where that is so."""
    said = [(one, words.warning(one)) for one in findings]
    several = len(findings) > 1
    return [f"{one.suite.title + ': ' if several else ''}{text}." for one, text in said if text]


def _label(run: str, findings: Sequence[Findings]) -> str:
    """``collapsed`` for a run that is broken by any benchmark, as on the page."""
    broken = any(line.collapsed for one in findings for line in one.lines if line.name == run)
    return "collapsed" if broken else ""


def _number(value: object) -> str:
    if not isinstance(value, (int, float)):
        return "-"
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3f}"
