"""Run the command ``unlora export``; the export itself is in ``unlora.model.standalone``."""

import argparse
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from unlora.errors import InputError
from unlora.runs.run import refuse_unwritable


def main(argv: Sequence[str]) -> None:
    """Export a run and print where it is.

    Raises:
        InputError: there is no such run, it is not said in which form, or it cannot be exported.
        GuardError: what was written answers differently.
    """
    parser = argparse.ArgumentParser(prog="unlora export", add_help=False, exit_on_error=False)
    parser.add_argument("run", nargs="?")
    parser.add_argument("--merged", action="store_const", dest="form", const="merged")
    parser.add_argument("--adapter", action="store_const", dest="form", const="adapter")
    parser.add_argument("--output")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--base")
    try:
        args, strange = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise InputError(f"{error}. Type: unlora export --help") from error
    if strange:
        raise InputError(f"unlora export cannot use {strange[0]!r}. Type: unlora export --help")
    if not args.run:
        raise InputError("Which run? Type: unlora export saves/unlearn/NAME --merged")
    if not os.path.isdir(args.run):  # before the seconds that torch takes
        raise InputError(f"There is no run folder {args.run!r}.")
    if not args.form or {"--merged", "--adapter"} <= set(argv):
        raise InputError(
            "In which form? --merged writes full weights, --adapter one adapter on the root "
            f"model. Type: unlora export {args.run} --merged"
        )
    folder = Path(args.output or Path(args.run, "exported", args.form))
    refuse_unwritable(folder, "folder of the export", "Give --output")
    write = import_module("unlora.model.standalone").export
    print(write(args.run, args.form, args.output, dtype=args.dtype, base=args.base))
