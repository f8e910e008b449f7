"""Run the command ``unlora export``; the export itself is in ``unlora.model.standalone``."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from unlora.cli.argument_parsing import parse_known
from unlora.cli.audit import read_words
from unlora.errors import InputError, system_in_words
from unlora.runs.run import refuse_unwritable

RANK, LARGEST_RANK = 64, 512  # of a served adapter
FORMS = ("--merged", "--adapter", "--serve")


def main(argv: Sequence[str]) -> None:
    """Export a run and print where it is.

    Raises:
        InputError: there is no such run, it is not said in which form, or it cannot be exported.
        GuardError: what was written answers differently.
    """
    args, strange = _parsed(argv)
    overrides = [word for word in strange if "=" in word and args.form == "serve"]
    if strange := [word for word in strange if word not in overrides or word.startswith("-")]:
        raise InputError(f"unlora export cannot use {strange[0]!r}. Type: unlora export --help")
    if not args.run:
        raise InputError("Which run? Type: unlora export saves/unlearn/NAME --merged")
    if not os.path.isdir(args.run):  # before the seconds that torch takes
        raise InputError(f"There is no run folder {args.run!r}.")
    if not args.form or len(set(FORMS) & set(argv)) > 1:
        raise InputError(
            "In which form? --merged writes full weights, --adapter one adapter on the root "
            "model, --serve what serving programs take. "
            f"Type: unlora export {args.run} --merged"
        )
    folder = Path(args.output or Path(args.run, "exported", args.form))
    refuse_unwritable(folder, "folder of the export", "Give --output")
    if args.form == "serve":
        _serve(args, overrides)
        return
    if args.rank is not None or args.llama_cpp is not None:
        raise InputError("--rank and --llama-cpp belong to --serve. Type: unlora export --help")
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    logging.getLogger("unlora").setLevel(logging.INFO)
    write = import_module("unlora.model.standalone").export
    print(write(args.run, args.form, args.output, dtype=args.dtype, base=args.base))


def _parsed(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The words that are known, and the others.

    Raises:
        InputError: a word lacks its value.
    """
    parser = argparse.ArgumentParser(prog="unlora export", add_help=False, exit_on_error=False)
    parser.add_argument("run", nargs="?")
    parser.add_argument("--merged", action="store_const", dest="form", const="merged")
    parser.add_argument("--adapter", action="store_const", dest="form", const="adapter")
    parser.add_argument("--serve", action="store_const", dest="form", const="serve")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--llama-cpp")
    parser.add_argument("--output")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--base")
    return parse_known(parser, argv)


def _serve(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Write what serving programs take.

    Raises:
        InputError: a word is wrong, or it cannot be exported.
    """
    if args.dtype != "auto":
        raise InputError("--serve writes bfloat16. For another dtype: --merged --dtype float32")
    if args.rank is not None and not 1 <= args.rank <= LARGEST_RANK:
        raise InputError(
            f"--rank is {args.rank}; it must be from 1 to {LARGEST_RANK}, as vLLM has it."
        )
    config = read_words("audit", [args.run, *overrides, "--quiet"])
    with system_in_words():
        serve = import_module("unlora.recipes.serve").serve
        print(
            serve(
                args.run, config, rank=args.rank or RANK, output=args.output, base=args.base,
                llama_cpp=args.llama_cpp,
            )
        )  # fmt: skip
