"""Write the page: one HTML file that asks no host for anything, and as Markdown and CSV."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from unlora.report import audit_section, audits, figures, markdown, provenance, summary
from unlora.report.examples import Answers, collect, script_json
from unlora.report.findings import Comparison, Findings, Line, compare
from unlora.report.runs import Entry, Row
from unlora.report.suites import AIM_WORDS
from unlora.runs.atomic_files import write_text
from unlora.runs.redaction import redacted


def write(
    folder: Path,
    entries: Sequence[Entry] | Comparison,
    *,
    title: str,
    trials: Sequence[Mapping[str, Any]] = (),
    budget: str | None = None,
    missing: Sequence[str] = (),
) -> Path:
    """Write ``report.html``, ``report.md`` and ``table.csv``, each of them whole or not at all.

    The same runs give the same bytes.

    Args:
        trials: of a search for settings: ``method``, ``number``, ``params``, ``distance``,
            ``utility``, ``feasible``, ``state`` each.
        budget: one sentence on what the search was allowed.
        missing: what was to be compared and has failed, a sentence each.

    Returns:
        The page.

    Raises:
        InputError: there is nothing to read, a log is missing or broken, or runs contradict each
            other.
    """
    read = entries if isinstance(entries, Comparison) else compare(entries)
    rows, findings = read.rows, read.findings
    answers = {
        finding.kind: collect([line.row for line in finding.lines], finding.kind)
        for finding in findings
    }
    runs = provenance.facts(rows)
    page = folder / "report.html"
    written = markdown.as_markdown(title, findings, answers, rows, runs, trials, budget, missing)
    write_text(folder / "report.md", redacted(written))
    write_text(folder / "table.csv", redacted(markdown.as_csv(findings)))
    html = _html(title, findings, answers, rows, runs, trials, budget, missing)
    write_text(page, redacted(html))
    return page


def _html(
    title: str,
    findings: Sequence[Findings],
    answers: Mapping[str, Answers],
    rows: Sequence[Row],
    runs: Sequence[provenance.Facts],
    trials: Sequence[Mapping[str, Any]],
    budget: str | None,
    missing: Sequence[str],
) -> str:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        finalize=lambda value: markdown.harmless(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    theme, script = _source("theme.js"), _source("report.js")
    content = {
        "title": markdown.one_line(title),
        "style": Markup(_source("report.css")),
        "theme": Markup(theme),
        "script": Markup(script),
        "script_hashes": " ".join(map(_hash, (theme, script))),
        "holds": audit_section.holds(rows),
        "dials": audit_section.dials(rows),
        "sections": [_section(finding, answers[finding.kind]) for finding in findings],
        "curves": [{**curve, "svg": Markup(curve["svg"])} for curve in _curves(rows)],
        "runs": runs,
        "columns": [key for key in runs[0].values if any(run.values[key] for run in runs)],
        "differences": provenance.differences(rows),
        "versions": provenance.versions(rows),
        "commands": list(dict.fromkeys(run.command for run in runs if run.command)),
        "thresholds": summary.THRESHOLDS,
        "trials": [{**trial, "settings": markdown.settings(trial)} for trial in trials],
        "budget": budget,
        "missing": missing,
        "shown": markdown.shown,
    }
    page = environment.get_template("report.html").render(content)
    # half a surrogate pair is no character
    return page.encode("utf-8", "replace").decode("utf-8")


def _section(finding: Findings, answers: Answers) -> dict[str, Any]:
    from markupsafe import Markup

    return {
        "kind": finding.kind,
        "title": finding.suite.title,
        "headline": summary.headline(finding),
        "sentences": summary.sentences(finding),
        "measured": summary.measured_by(finding),
        "scatter": Markup(figures.scatter(finding)),
        "scatter_words": _scatter_words(finding),
        "lines": finding.lines,
        "main": [_column(finding, metric) for metric in finding.main],
        "others": [_column(finding, metric) for metric in finding.others],
        "cell": _cell,
        "audited": audits.COLUMNS if audits.audited(line.row for line in finding.lines) else {},
        "audit_cells": audit_section.table_cells,
        "verdict": audits.shown_verdict,
        "seeds": any(len(line.row.results) > 1 for line in finding.lines),
        "json": Markup(script_json(answers.as_json())) if answers.splits else None,
        "shared": {label: before for label, before in answers.shared.items() if before},
        "note": answers.note,
    }


def _column(finding: Findings, metric: str) -> dict[str, str]:
    arrow = {"gold": "◎", "high": "↑", "low": "↓", "zero": "→0"}.get(finding.aims[metric] or "", "")
    return {
        "metric": metric,
        "heading": finding.heading(metric),
        "aim": AIM_WORDS[finding.aims[metric]],
        "arrow": arrow,
    }


def _cell(line: Line, metric: str) -> dict[str, Any]:
    cell = line.cells[metric]
    return {
        "value": markdown.shown(cell.mean),
        "interval": markdown.shown_interval(cell),
        "seeds": [markdown.shown(value) for value in cell.seeds],
        "best": metric in line.best,
        "note": cell.note if cell.mean is None else None,
    }


def _scatter_words(finding: Findings) -> str:
    """What the scatter shows, for who does not see it."""
    parts, figure = [], markdown.shown if finding.scale == "raw" else summary.percent
    for line in finding.lines:
        forgot, utility = line.point.forgot, line.point.kept
        if forgot is not None and utility is not None:
            parts.append(
                f"{line.name} at {figure(forgot)} forgotten and {figure(utility)} utility"
                + (", collapsed" if line.collapsed else "")
            )
    return "Forgotten against utility kept: " + "; ".join(parts) + "."


def _curves(rows: Sequence[Row]) -> list[dict[str, str]]:
    curves = []
    for i, row in enumerate(rows):
        histories = [figures.history(result.run.manifest.get("training")) for result in row.results]
        svg = figures.curves([h for h in histories if h], f"curve-{i}")
        if svg:
            curves.append(
                {"name": row.name, "svg": svg, "words": _curve_words(row.name, histories)}
            )
    return curves


def _curve_words(name: str, histories: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    losses = [step for step in histories[0] if isinstance(step.get("loss"), (int, float))]
    return (
        f"Training of {name}: loss from {markdown.shown(losses[0]['loss'])} to "
        f"{markdown.shown(losses[-1]['loss'])} in {losses[-1]['step']} steps."
        if losses
        else f"Training of {name}."
    )


def _source(name: str) -> str:
    return resources.files("unlora.report").joinpath("templates", name).read_text("utf-8")


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
