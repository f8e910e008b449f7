"""Run the command ``unlora who-saw``; the search itself is in ``unlora.recipes.who_saw``."""

import argparse
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from unlora.cli.argument_parsing import parse
from unlora.cli.main import refuse_broken_stack
from unlora.errors import InputError
from unlora.runs.redaction import safe

MOST_ROWS = 20  # of which every sighting is printed


def main(argv: Sequence[str]) -> None:
    """Print which runs were trained on the rows of a file.

    Raises:
        InputError: there is no such file or run, or a word is wrong.
    """
    args = _arguments(argv)
    refuse_broken_stack()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    rows = import_module("unlora.data.rows").load_rows(args.rows)
    keys = {key: getattr(args, key) for key in ("question_key", "answer_key", "text_key")}
    answer = import_module("unlora.recipes.who_saw").who_saw(rows, args.folders, **keys)
    print(json.dumps(as_json(answer), indent=2) if args.json else safe(as_text(answer)))


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="unlora who-saw", add_help=False, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("rows", nargs="?")
    parser.add_argument("folders", nargs="*", default=["saves"])
    parser.add_argument("--json", action="store_true")
    for key in ("question", "answer", "text"):
        parser.add_argument(f"--{key}-key", default=key)
    args = parse(parser, argv)
    if not args.rows:
        raise InputError("Which rows? Type: unlora who-saw FILE saves/")
    if not os.path.isfile(args.rows):
        raise InputError(
            f"There is no file {args.rows!r}. Give rows as .jsonl, .json, .csv, .parquet or .txt."
        )
    return args


def as_json(answer: Any) -> dict[str, Any]:
    """All of the answer."""
    return {
        "rows": [
            [
                {"run": str(x.run), "link": str(x.link), "part": x.part, "match": x.match}
                for x in row
            ]
            for row in answer.rows
        ],
        "unknown": [{"run": str(x.run), "link": str(x.link), "why": x.why} for x in answer.unknown],
        "runs": [str(run) for run in answer.runs],
        "roots": list(answer.roots),
    }


def as_text(answer: Any) -> str:
    """A table of the runs that were trained on rows, and of a few rows each sighting."""
    counts: Counter[tuple[Path, str, str]] = Counter()
    links: dict[tuple[Path, str], Path] = {}
    below: dict[Path, dict[str, None]] = {}
    for row in answer.rows:
        counts.update({(x.link.resolve(), x.part, x.match) for x in row})
        for x in row:
            folder = x.link.resolve()
            links[folder, x.part] = x.link
            runs = below.setdefault(folder, {})
            if x.run.resolve() != folder:
                runs[str(x.run)] = None
    table = [["trained on them", "as", "exact", "near", "and stands below"]]
    for (folder, part), link in links.items():
        numbers = (str(counts[folder, part, match]) for match in ("exact", "near"))
        table.append([str(link), part, *numbers, ", ".join(below[folder])])
    seen = sum(bool(row) for row in answer.rows)
    lines = [*_of_rows(answer.rows), *(_aligned(table) if links else [])]
    lines += [f"{seen} of {len(answer.rows)} rows were seen; runs: {len(answer.runs)}."]
    lines += [
        f"Unknown: {x.link}{'' if x.run == x.link else f', below {x.run}'}: {x.why}"
        for x in answer.unknown
    ]
    lines += [
        f"Nobody can tell what the root model {root} was trained on." for root in answer.roots
    ]
    return "\n".join(lines)


def _of_rows(rows: Sequence[Sequence[Any]]) -> list[str]:
    if len(rows) > MOST_ROWS:
        return [f"Each of the {len(rows)} rows: --json", ""]
    lines = []
    for number, row in enumerate(rows, start=1):
        links = {x.link.resolve(): f"{x.match} in {x.link} ({x.part})" for x in row}
        lines.append(f"row {number}: {'; '.join(links.values()) or 'nobody saw it'}")
    return [*lines, ""]


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ] + [""]
