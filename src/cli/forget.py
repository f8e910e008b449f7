"""Run the command ``unlora forget``; what it does is in ``unlora.deletion``."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module

from unlora.cli.argument_parsing import parse_known, unusable
from unlora.cli.main import refuse_broken_stack
from unlora.errors import InputError, system_in_words

ID = re.compile(r"[\w-][\w.-]{0,79}")
COLUMNS = ("question_key", "answer_key", "text_key")
ROUTES, DIALS = ("auto", "exact", "approximate"), ("audit", "plain", "none")


def main(argv: Sequence[str]) -> None:
    """Answer a deletion request, or print what it would cost.

    Raises:
        InputError: something in the request, the model or the data can be put right.
    """
    args = _parsed(argv)
    _check(args)
    refuse_broken_stack()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    order = import_module("unlora.deletion.order").Order(
        model=args.model, rows=args.rows[0] if args.rows else None, where=args.where,
        retain=args.retain, route=args.route, method=args.method, dial=args.dial,
        exact_up_to=args.exact_up_to, name=args.id, keep_rows=args.keep_rows,
        columns={key: getattr(args, key) for key in COLUMNS}, words=tuple(args.words),
    )  # fmt: skip
    with system_in_words():
        import_module("unlora.deletion.deletion_request").run(order, dry_run=args.dry_run)


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="unlora forget", add_help=False, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--model")
    parser.add_argument("--where")
    parser.add_argument("--retain")
    parser.add_argument("--route", default="auto")
    parser.add_argument("--method", default="NPO")
    parser.add_argument("--dial", default="audit")
    parser.add_argument("--exact-up-to", type=float, default=1.5)
    parser.add_argument("--id")
    for key in COLUMNS:
        name = key.removesuffix("_key")
        parser.add_argument(f"--{name}-key", default=name)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--keep-rows", action="store_true")
    args, rest = parse_known(parser, argv)
    args.words = [word for word in rest if "=" in word and not word.startswith("-")]
    args.words += [word for word in rest if word.startswith("~")]
    args.rows = [word for word in rest if word not in args.words and not word.startswith("-")]
    if strange := [word for word in rest if word.startswith("-")]:
        raise unusable(parser, strange[0])
    return args


def _check(args: argparse.Namespace) -> None:
    """Raise InputError for what the words alone show, before the seconds that torch takes."""
    if len(args.rows) > 1:
        raise InputError(f"One file at a time: {args.rows[0]!r} and {args.rows[1]!r} are two.")
    if bool(args.rows) == bool(args.where):
        either = "and" if args.rows else "nor"
        raise InputError(
            f"{'Both' if args.rows else 'Neither'} a file of rows {either} --where: which rows "
            "must go? Give one of them: unlora forget ROWS.jsonl --model saves/finetune/NAME"
        )
    if args.rows and not os.path.isfile(args.rows[0]):
        raise InputError(f"There is no file {args.rows[0]!r}. Give the rows that must go.")
    if args.retain and not os.path.isfile(args.retain):
        raise InputError(f"--retain is {args.retain!r}, and there is no such file.")
    if not args.model:
        raise InputError("Which model? Give its run folder: --model saves/finetune/NAME")
    if not os.path.isdir(args.model):
        raise InputError(f"There is no run folder {args.model!r}.")
    for name, value, allowed in (("route", args.route, ROUTES), ("dial", args.dial, DIALS)):
        if value not in allowed:
            raise InputError(f"--{name} is {value!r}; it must be one of {', '.join(allowed)}.")
    if not 0 <= args.exact_up_to < float("inf"):
        raise InputError(
            f"--exact-up-to is {args.exact_up_to}; it must be a number from 0 on: exact is taken "
            "where it costs at most so many times as much as approximate."
        )
    if args.id is not None and not ID.fullmatch(args.id):
        raise InputError(
            f"--id is {args.id!r}; it names folders: letters, digits, ., _ and -, at most 80."
        )
