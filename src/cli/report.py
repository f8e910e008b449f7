"""Run the command ``unlora report``: compare runs on one page."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from unlora.cli.argument_parsing import parse
from unlora.errors import InputError
from unlora.report import compare, write
from unlora.report.run_roles import STUDY, entries_of, read_study
from unlora.report.runs import Entry
from unlora.report.table import warnings
from unlora.runs.redaction import safe
from unlora.runs.run import refuse_unwritable

RUNS = "folder of a run, of a study, or of Open-Unlearning's saves/"
TARGET = "the model before unlearning; else what the runs say"
GOLD = "the model that never saw it; else what the runs say"
EXAMPLES = """examples:
  unlora report saves/unlearn/npo                      with the target and gold that it names
  unlora report saves/unlearn/npo saves/unlearn/simnpo --output saves/report/mine
  unlora report saves/study/pocket                     a whole study
  unlora report saves/unlearn/npo --target saves/finetune/full --gold saves/finetune/retain90
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Write ``report.html``, ``report.md`` and ``table.csv``.

    Raises:
        InputError: a folder is not there or holds no log, or a log is broken.
    """
    args = _arguments(argv)
    entries, trials, budgets, names, missing = [], [], [], [], []
    studies = [run for run in args.runs if (run / STUDY).is_file()]
    for run in studies:
        study = read_study(run)
        label = f"{study.name}/" if len(studies) > 1 else ""
        entries += [_renamed(entry, label) for entry in study.entries]
        trials += [{**t, "method": f"{label}{t.get('method', '')}"} for t in study.trials]
        budgets += [study.budget] if study.budget else []
        missing += [f"{label}{failure}" for failure in study.missing]
        names.append(study.name)
    single = [run for run in args.runs if run not in studies]
    if single or args.target or args.gold:
        listed = entries_of(single, target=args.target, gold=args.gold)
        taken = {entry.name for entry in entries}
        has = {entry.role for entry in entries} if studies else set()
        for entry in listed:
            # one target and one gold: those of the study, unless others were asked for
            if entry.role in has and entry.folder not in (args.target, args.gold):
                entry = replace(entry, role="method")
            if entry.name in taken:
                entry = replace(entry, name=f"{entry.folder.parent.name}/{entry.name}")
            entries.append(entry)
        for role, chosen in (("target", args.target), ("gold", args.gold)):
            if chosen and role in has:
                entries = [e for e in entries if e.role != role or e.folder == chosen]
        names += [entry.name for entry in listed if entry.role == "method"][:4]
    if len(studies) > 1:
        entries = _one_of_each(entries)
    title = args.title or ", ".join(dict.fromkeys(names)) or "runs"
    refuse_unwritable(args.output, "folder of the report", "Give --output")
    read = compare(entries)
    page = write(
        args.output, read, title=title, trials=trials, budget=" ".join(budgets) or None,
        missing=missing,
    )  # fmt: skip
    print(safe("\n".join([*warnings(read.findings), _summary(entries, page)])))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    args = parse(_parser(), sys.argv[1:] if argv is None else argv)
    if not args.runs:
        raise InputError("Which runs? Type: unlora report saves/unlearn/NAME")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unlora report",
        description="Compare runs on one page: what was forgotten, what was kept, and every answer "
        "before and after.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("runs", metavar="RUN", nargs="*", type=Path, help=RUNS)
    parser.add_argument(
        "--output", metavar="FOLDER", type=Path, default=Path("saves/report"),
        help="where report.html, report.md and table.csv go (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--target", metavar="RUN", type=Path, help=TARGET)
    parser.add_argument("--gold", metavar="RUN", type=Path, help=GOLD)
    parser.add_argument("--title", metavar="TEXT", help="what stands above the page")
    return parser


def _renamed(entry: Entry, label: str) -> Entry:
    return replace(entry, name=label + entry.name)


def _one_of_each(entries: Sequence[Entry]) -> list[Entry]:
    """Targets and golds of further studies are rows like any other."""
    first: dict[str, str] = {}
    for entry in entries:
        if entry.role != "method":
            first.setdefault(entry.role, entry.name)
    return [
        replace(entry, role="method")
        if entry.role != "method" and first[entry.role] != entry.name
        else entry
        for entry in entries
    ]


def _summary(entries: Sequence[Entry], page: Path) -> str:
    by_name: Mapping[str, Any] = {entry.name: entry for entry in entries}
    lines = [f"  {entry.role:7} {name}" for name, entry in by_name.items()]
    missing = [r for r in ("target", "gold") if r not in {entry.role for entry in entries}]
    if missing:
        flags = " ".join(f"--{role} RUN" for role in missing)
        lines.append(f"  There is no {' and no '.join(missing)}. To compare with one: {flags}")
    return "\n".join([*lines, f"The page: {page}"])
