"""Run the command ``unlora dial``; the dial itself is in ``unlora.recipes.dial_run``."""

from collections.abc import Sequence
from importlib import import_module

from unlora.cli.audit import read_words
from unlora.errors import InputError, system_in_words

VALUED = ("--to", "--output")


def main(argv: Sequence[str]) -> None:
    """Scale the unlearning adapter of a run, and print where the new run is.

    Raises:
        InputError: there is no such run, it cannot be scaled, or a word is wrong.
    """
    words, options = [*argv], {"--to": "audit", "--output": None}
    rest = []
    while words:
        word = words.pop(0)
        name, sign, value = word.partition("=")
        if name in VALUED:
            if not sign and not words:
                raise InputError(f"{name} has no value. Type: unlora dial --help")
            options[name] = value if sign else words.pop(0)
        else:
            rest.append(word)
    config = read_words("dial", rest)
    with system_in_words():
        import_module("unlora.recipes.dial_run").run(config, options["--to"], options["--output"])
