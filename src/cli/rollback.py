"""Run the command ``unlora rollback``; what it does is in ``unlora.deletion.request_rollback``."""

from collections.abc import Sequence
from importlib import import_module

from unlora.errors import InputError, system_in_words


def main(argv: Sequence[str]) -> None:
    """Take a request back, and print what is served again.

    Raises:
        InputError: there is no such request, or a model stands on it.
    """
    if strange := [word for word in argv if word.startswith("-")]:
        raise InputError(f"unlora rollback cannot use {strange[0]!r}. Type: unlora rollback --help")
    if len(argv) != 1:
        which = "One request at a time" if argv else "Which request?"
        raise InputError(f"{which} Type: unlora rollback ID")
    with system_in_words():
        print(import_module("unlora.deletion.request_rollback").run(argv[0]))
