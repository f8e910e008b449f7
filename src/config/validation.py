"""Validate a section as its pydantic type, or list every mistake in it, a sentence each."""

import re
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from unlora.errors import InputError
from unlora.registry import unknown
from unlora.runs.redaction import HIDDEN, is_secret, without_secrets, without_setting

EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "a section with keys",
    "model_type": "a section with keys",
    "list_type": "a list",
}


def checked(schema: Any, content: Mapping[str, Any], *above: str) -> Any:
    """A section as its type, a ``Section`` or ``TypedDict``; ``above`` are the keys it is under.

    Raises:
        InputError: every mistake found, one a line.
    """
    try:
        return TypeAdapter(schema).validate_python(content)
    except ValidationError as error:
        mistakes = error.errors(include_url=False)
        raise InputError("\n".join(_sentence(schema, item, above) for item in mistakes)) from error


def _sentence(schema: Any, error: Mapping[str, Any], above: tuple[str, ...]) -> str:
    """Write one mistake as a sentence: the key, its value, what is allowed."""
    loc = tuple(str(step) for step in error["loc"])
    key, kind = ".".join([*above, *loc]), error["type"]
    value = _shown(error["input"], loc)
    if kind == "extra_forbidden":
        section = ".".join([*above, *loc[:-1]])
        return unknown(f"key of {section}" if section else "key", loc[-1], _keys(schema, loc))
    if kind == "missing":
        return f"{key} is missing. Give {key}=..."
    if kind == "value_error":
        reason = without_setting(str(error["ctx"]["error"]))
        return (
            f"{key}: {reason}" if reason.startswith("Unknown") else f"{key} is {value!r}: {reason}"
        )
    if kind == "literal_error":
        return unknown(key, value, re.findall("'(.*?)'", error["ctx"]["expected"]))
    shown = f"{value!r} (text)" if isinstance(value, str) else repr(value)
    allowed = EXPECTED.get(kind) or error["msg"].removeprefix("Input should be ")
    return f"{key} is {shown}; it must be {allowed}."


def _shown(value: Any, loc: tuple[str, ...]) -> Any:
    """A value without the secrets that are in it, or that it is."""
    if any(is_secret(step, value) for step in loc):
        return HIDDEN
    if isinstance(value, list):
        return [
            without_setting(item) if isinstance(item, str) else _shown(item, ()) for item in value
        ]
    return without_secrets(value)


def _keys(schema: Any, loc: tuple[str, ...]) -> list[str]:
    """The keys that could stand where the last step of ``loc`` stands."""
    for step in loc[:-1]:
        schema = _inner(schema, step)
    return list(getattr(schema, "model_fields", getattr(schema, "__annotations__", ())))


def _inner(schema: Any, step: str) -> Any:
    """The type of the value under key ``step``."""
    fields = getattr(schema, "model_fields", None)
    inner = fields[step].annotation if fields else getattr(schema, "__annotations__", {}).get(step)
    if get_origin(schema) is dict:
        inner = get_args(schema)[1]
    while get_origin(inner) not in (None, dict):  # Required[X], X | None
        inner = get_args(inner)[0]
    return inner
