"""Write the page for papers and programs: ``report.md`` and ``table.csv``."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from unlora.report import audits, summary
from unlora.report.examples import Answers
from unlora.report.findings import Findings
from unlora.report.provenance import Facts, differences
from unlora.report.runs import Row
from unlora.report.suites import AIM_WORDS, Aim
from unlora.report.summary import shown, shown_interval

EXAMPLES, LONGEST = 3, 300


def as_csv(all_findings: Sequence[Findings]) -> str:
    """One line for each method and metric."""
    seeds = max(len(line.row.results) for findings in all_findings for line in findings.lines)
    audited = any(audits.audited(line.row for line in findings.lines) for findings in all_findings)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ["suite", "method", "role", "collapsed", "metric", "better", "best", "mean", "low95",
         "high95", *(f"seed_{i + 1}" for i in range(seeds)), "note",
         *(["verdict"] if audited else [])]
    )  # fmt: skip
    for findings in all_findings:
        for line in findings.lines:
            verdict = [plain(audits.shown_verdict(line.row))] if audited else []
            of_audit = audits.cells(line.row) if audits.audits(line.row) else {}
            cells = {m: line.cells[m] for m in (*findings.main, *findings.others)} | of_audit
            for metric, cell in cells.items():
                bounds = cell.interval or (None, None)
                figures = [cell.mean, *bounds, *cell.seeds, *[None] * (seeds - len(cell.seeds))]
                writer.writerow(
                    [findings.kind, plain(line.name), line.role, int(bool(line.collapsed)),
                     plain(metric), AIM_WORDS[_aim(findings, metric)], int(metric in line.best),
                     *("" if x is None else repr(x) for x in figures),
                     plain(cell.note or findings.note(metric)), *verdict]
                )  # fmt: skip
    return stream.getvalue()


def _aim(findings: Findings, metric: str) -> Aim | None:
    return "zero" if metric in audits.COLUMNS else findings.aims[metric]


def as_markdown(
    title: str,
    all_findings: Sequence[Findings],
    answers: Mapping[str, Answers],
    rows: Sequence[Row],
    runs: Sequence[Facts],
    trials: Sequence[Mapping[str, Any]],
    budget: str | None,
    missing: Sequence[str] = (),
) -> str:
    """Write the page as Markdown: tables, examples, settings."""
    parts = [f"# {inline(title)}"]
    for findings in all_findings:
        parts += [f"## {inline(findings.suite.title)}"] if len(all_findings) > 1 else []
        parts += [f"**{inline(summary.headline(findings))}.**"]
        parts += [
            "\n".join(f"- **{inline(n)}** {inline(s)}" for n, s in summary.sentences(findings))
        ]
        parts += [
            inline(summary.measured_by(findings)),
            _main_table(findings),
            _other_table(findings),
        ]
        parts += [_examples(answers[findings.kind])]
    if holds := [row for row in rows if audits.audits(row)]:
        parts += ["## Does it hold?", audits.INTRODUCTION, *map(_attacks, holds)]
    if missing:
        parts += [
            "Not here, as it failed:",
            "\n".join(f"- {inline(failure)}" for failure in missing),
        ]
    names, different = differences(rows)
    if different:
        body = [[f"`{code(key)}`", *(f"`{code(row[n])}`" if row[n] else "" for n in names)]
                for key, row in different.items()]  # fmt: skip
        parts += ["## Settings that differ", _table(["setting", *map(inline, names)], body)]
    if trials or budget:
        parts += ["## Search", inline(budget or ""), trial_table(trials)]
    columns = [key for key in runs[0].values if any(run.values[key] for run in runs)]
    body = [[inline(r.name), inline(r.seed), f"`{code(r.folder)}`",
             *(inline(r.values[c]) for c in columns)] for r in runs]  # fmt: skip
    parts += ["## Runs", _table(["run", "seed", "folder", *columns], body)]
    commands = list(dict.fromkeys(run.command for run in runs if run.command))
    parts += (
        ["Commands:\n\n" + "\n".join(f"    {one_line(c)}" for c in commands)] if commands else []
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def trial_table(trials: Sequence[Mapping[str, Any]]) -> str:
    """Tabulate the trials of a search, one row each."""
    if not trials:
        return ""
    body = [
        [inline(str(t.get("method", ""))), str(t.get("number", "")), inline(settings(t)),
         shown(_number(t.get("distance"))), shown(_number(t.get("utility"))),
         "yes" if t.get("feasible") else "no", inline(str(t.get("state", "")))]
        for t in trials
    ]  # fmt: skip
    return _table(["method", "trial", "settings", "distance", "utility", "feasible", "state"], body)


def settings(trial: Mapping[str, Any]) -> str:
    """The settings of a trial as overrides."""
    params = trial.get("params")
    if not isinstance(params, Mapping):
        return ""
    return " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in sorted(params.items())
    )


def inline(text: str) -> str:
    """Text inside a Markdown table or paragraph, every mark of Markdown and HTML without effect."""
    text = one_line(text)
    text = re.sub(r"([\\`*_{}\[\]()#+!|~$^-])", r"\\\1", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(text: str) -> str:
    """Text between two backticks of a Markdown table."""
    return one_line(text).replace("`", "'").replace("|", "\\|")


def one_line(text: str) -> str:
    """Without line breaks, and without characters that reorder what stands beside them."""
    return " ".join(harmless(text).split())


def harmless(text: str) -> str:
    """Without characters that no page shows, and that act on what stands beside them."""
    text = re.sub(r"[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]", "", text)
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", " ", text)


def plain(text: str) -> str:
    """A cell of text that no spreadsheet takes for a formula."""
    start = text[:1]  # also before what is no sign of a text
    text = harmless(text)
    return "'" + text if text.lstrip()[:1] in tuple("=+-@") or start in ("\t", "\r") else text


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _main_table(findings: Findings) -> str:
    audited = audits.audited(line.row for line in findings.lines)
    of_audit = [*audits.COLUMNS, "verdict"] if audited else []
    head = ["", *(inline(findings.heading(metric)) for metric in findings.main), *of_audit, ""]
    body = []
    for line in findings.lines:
        cells = []
        for metric in findings.main:
            cell = line.cells[metric]
            value = shown(cell.mean)
            value = f"**{value}** (best)" if metric in line.best else value
            cells.append(f"{value} {inline(shown_interval(cell))}".rstrip())
        if audited:
            figures = audits.cells(line.row).values()
            cells += [f"{shown(c.mean)} {inline(shown_interval(c))}".rstrip() for c in figures]
            cells.append(inline(audits.shown_verdict(line.row)))
        body.append([inline(line.name), *cells, "collapsed" if line.collapsed else ""])
    goals = ["*best*", *(AIM_WORDS[findings.aims[metric]] for metric in findings.main)]
    goals += [*(AIM_WORDS["zero"] for _ in audits.COLUMNS), "", ""] if audited else [""]
    return _table(head, [*body, goals])


def _attacks(row: Row) -> str:
    """What attacks brought back of one run, and its verdict."""
    sentences = " ".join(map(inline, audits.sentences(row)))
    body = []
    for bar in audits.bars(row):
        low, high = map(shown, bar.interval or (None, None))
        value = f"{shown(bar.value)} \\[{low}, {high}\\]" if bar.interval else shown(bar.value)
        body.append([inline(bar.words), inline(bar.form), value, inline(bar.why_not)])
    table = _table(["attack", "form", "residual", "not counted"], body)
    return f"**{inline(row.name)}.** {sentences}\n\n{table}"


def _other_table(findings: Findings) -> str:
    names = [inline(line.name) for line in findings.lines]
    body = [
        [f"`{code(metric)}`", *(f"{shown(line.cells[metric].mean)} "
         f"{inline(shown_interval(line.cells[metric]))}".rstrip() for line in findings.lines)]
        for metric in findings.others
    ]  # fmt: skip
    return "### All other metrics\n\n" + _table(["metric", *names], body) if body else ""


def _examples(answers: Answers) -> str:
    """The first rows of the first split, as the models answered them."""
    rows = next(iter(answers.splits.values()), ())[:EXAMPLES]
    if not rows:
        return ""
    first = [i for i, (row, result) in enumerate(answers.models) if result is row.results[0]]
    names = [inline(answers.models[i][0].name) for i in first]
    body = [
        [_short(row.question), _short(row.truth), *(_short(x[0]) if (x := row.answers[i]) else ""
         for i in first)]
        for row in rows
    ]  # fmt: skip
    return "### First rows to forget\n\n" + _table(["question", "true answer", *names], body)


def _short(text: str) -> str:
    return inline(text if len(text) <= LONGEST else text[:LONGEST] + " …")


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
