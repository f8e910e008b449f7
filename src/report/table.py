"""Print one table of all runs and benchmarks, as plain text."""

from collections.abc import Sequence

from unlora.report import audits, summary
from unlora.report.findings import Comparison, Findings
from unlora.report.runs import Cell, Row
from unlora.report.suites import SUITES
from unlora.runs.redaction import safe


def text_table(comparison: Comparison) -> str:
    """The table, one run a line, with the collapsed ones marked.

    Above it stands why no figure of forgetting means anything, where that is so.
    """
    findings = comparison.findings
    headings = {metric: head for suite in SUITES.values() for metric, head in suite.main.items()}
    lines = [line for finding in findings for line in finding.lines]
    metrics = [metric for metric in headings if any(metric in line.cells for line in lines)]
    audited = audits.audited(comparison.rows)
    of_audit = [*audits.COLUMNS, "verdict"] if audited else []
    rows = [["", *(headings[metric] for metric in metrics), *of_audit, ""]]
    for row in comparison.rows:
        own = [line for line in lines if line.name == row.name]
        cells = {metric: cell for line in own for metric, cell in line.cells.items()}
        values = [_decimal(cells.get(metric, Cell()).mean) for metric in metrics]
        values += _of_audit(row) if audited else []
        collapsed = any(line.collapsed for line in own)
        rows.append([safe(row.name), *values, "collapsed" if collapsed else ""])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines_of_text = [
        "  ".join(
            cell.ljust(width) if i in (0, len(row) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    rule = "-" * max(map(len, lines_of_text))
    table = "\n".join([lines_of_text[0], rule, *lines_of_text[1:]])
    return "\n\n".join([*warnings(findings), table])


def warnings(findings: Sequence[Findings]) -> list[str]:
    """Why the figures of forgetting of a benchmark mean little, where that is so."""
    texts = [(finding, summary.warning(finding)) for finding in findings]
    several = len(findings) > 1
    return [
        f"{finding.suite.title + ': ' if several else ''}{text}." for finding, text in texts if text
    ]


def _of_audit(row: Row) -> list[str]:
    """Residual and HELD with their intervals, and the verdict."""
    figures = [
        "-" if cell.mean is None else f"{cell.mean:.2f}" + _bounds(cell)
        for cell in audits.cells(row).values()
    ]
    return [*figures, safe(audits.shown_verdict(row)) or "-"]


def _bounds(cell: Cell) -> str:
    return " [{:.2f}, {:.2f}]".format(*cell.interval) if cell.interval else ""


def _decimal(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3f}"
