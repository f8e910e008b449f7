"""Run the command ``unlora audit``; the audit itself is in ``unlora.recipes.audit``."""

import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from unlora.cli.compose import composed
from unlora.cli.main import refuse_broken_stack
from unlora.config.audit import read_audit
from unlora.errors import InputError, system_in_words

FLAGS = {"--json": "output=json", "--quiet": "output=quiet"}


def main(argv: Sequence[str]) -> None:
    """Audit a run and print what was found.

    Raises:
        InputError: there is no such run, or something in the overrides is wrong.
    """
    runs = [word for word in argv if "=" not in word and not word.startswith("-")]
    flags = [word for word in argv if word.startswith("-")]
    if strange := [flag for flag in flags if flag not in FLAGS]:
        raise InputError(f"unlora audit cannot use {strange[0]!r}. Type: unlora audit --help")
    if len(runs) != 1:
        raise InputError(
            f"{'Which run' if not runs else 'One run at a time'}? Type: unlora audit "
            "saves/unlearn/NAME"
        )
    if not os.path.isdir(os.path.expanduser(runs[0])):  # before the seconds that torch takes
        raise InputError(f"There is no run folder {runs[0]!r}.")
    overrides = [word for word in argv if "=" in word and not word.startswith("-")]
    cfg = composed("audit", [*overrides, *(FLAGS[flag] for flag in flags)])
    cfg.run = runs[0]
    config = read_audit(cfg)
    refuse_broken_stack()
    quiet = config.output != "lines"
    level = logging.WARNING if quiet else logging.INFO
    logging.basicConfig(level=level, stream=sys.stderr, format="%(message)s")
    with system_in_words():
        import_module("unlora.recipes.audit").run(config)
