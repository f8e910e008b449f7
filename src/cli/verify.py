"""Run the command ``unlora verify``; what it checks is in ``unlora.deletion.verification``."""

import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from unlora.errors import InputError, system_in_words

WITH_MODEL = "--with-model"


def main(argv: Sequence[str]) -> None:
    """Check an evidence folder, and print what holds.

    Raises:
        InputError: there is no such folder, or it holds no evidence.
        GuardError: something in it was changed.
    """
    folders = [word for word in argv if not word.startswith("-")]
    if strange := [word for word in argv if word.startswith("-") and word != WITH_MODEL]:
        raise InputError(f"unlora verify cannot use {strange[0]!r}. Type: unlora verify --help")
    if len(folders) != 1:
        which = "One folder at a time" if folders else "Which folder?"
        raise InputError(f"{which} Type: unlora verify saves/requests/ID")
    if not os.path.isdir(folders[0]):
        raise InputError(f"There is no folder {folders[0]!r}.")
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    with system_in_words():
        check = import_module("unlora.deletion.verification").run
        print(check(folders[0], with_model=WITH_MODEL in argv))
