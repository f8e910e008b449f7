"""Write Python values as words of the command line, and run as if such a command was typed."""

import json
import numbers
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from unlora.cli.overrides import is_number, quoted
from unlora.errors import InputError
from unlora.runs.redaction import remember_settings, without_setting

BESIDE_MODEL_ARGS = ("base", "quantisation")


def word(key: str, value: Any) -> str:
    """``key=value`` as the command line has it."""
    return f"{key}={_written(value)}"


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, numbers.Real):  # of numpy, too
        return repr(int(value) if isinstance(value, numbers.Integral) else float(value))
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_written, value)) + "]"
    text = str(value).removeprefix("torch.")
    plain = text.replace("/", "").replace("_", "").replace("-", "").replace(".", "")
    constant = is_number(text) or text.lower() in ("true", "false", "null")
    return text if plain.isascii() and plain.isalnum() and not constant else quoted(text)


def model_words(path: str, model_args: Mapping[str, Any]) -> list[str]:
    """The words that choose a model, with arguments of ``from_pretrained``."""
    args = {"pretrained_model_name_or_path": path, **model_args}
    return [
        word(f"model.{key}" if key in BESIDE_MODEL_ARGS else f"model.model_args.{key}", value)
        for key, value in args.items()
    ]


def checked_overrides(overrides: Sequence[str], words: Sequence[str]) -> list[str]:
    """The overrides, which set nothing that one of the words sets.

    Raises:
        InputError: one does.
    """
    remember_settings(overrides)
    taken = {word.partition("=")[0] for word in words}
    if both := [word for word in overrides if word.partition("=")[0].lstrip("+@") in taken]:
        raise InputError(
            f"overrides has {without_setting(both[0])!r}, which an argument of this function sets, "
            "too. Give one of them."
        )
    return list(overrides)


@contextmanager
def as_command(words: Sequence[str]) -> Iterator[str]:
    """Have a manifest name this command, which does the same from a shell."""
    argv, sys.argv = sys.argv, list(words)
    try:
        yield shlex.join(words)
    finally:
        sys.argv = argv
