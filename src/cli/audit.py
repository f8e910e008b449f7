"""Run the command ``unlora audit``; the audit itself is in ``unlora.recipes.audit``."""

import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from unlora.cli.compose import composed
from unlora.cli.main import refuse_broken_stack
from unlora.config.audit_config import AuditConfig, read_audit
from unlora.errors import InputError, system_in_words

FLAGS = {"--json": "output=json", "--quiet": "output=quiet"}


def main(argv: Sequence[str]) -> None:
    """Audit a run and print what was found.

    Raises:
        InputError: there is no such run, or something in the overrides is wrong.
    """
    config = read_words("audit", argv)
    with system_in_words():
        import_module("unlora.recipes.audit").run(config)


def read_words(command: str, argv: Sequence[str]) -> AuditConfig:
    """The config that a command line of ``audit`` or ``dial`` asks for.

    Raises:
        InputError: there is no such run, or a word is wrong.
    """
    overrides = [word for word in argv if "=" in word or word.startswith("~")]
    runs = [word for word in argv if word not in overrides and not word.startswith("-")]
    flags = [word for word in argv if word.startswith("-")]
    if strange := [flag for flag in flags if flag not in FLAGS]:
        raise InputError(
            f"unlora {command} cannot use {strange[0]!r}. Type: unlora {command} --help"
        )
    if len(runs) != 1:
        which = "One run at a time" if runs else "Which run?"
        raise InputError(f"{which} Type: unlora {command} saves/unlearn/NAME")
    if not os.path.isdir(os.path.expanduser(runs[0])):  # before the seconds that torch takes
        raise InputError(f"There is no run folder {runs[0]!r}.")
    cfg = composed("audit", [*overrides, *(FLAGS[flag] for flag in flags)])
    cfg.run = runs[0]
    config = read_audit(cfg)
    refuse_broken_stack()
    level = logging.INFO if config.output == "lines" else logging.WARNING
    logging.basicConfig(level=level, stream=sys.stderr, format="%(message)s")
    return config
