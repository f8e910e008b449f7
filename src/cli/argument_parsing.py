"""Read the words of a command that Hydra does not read."""

import argparse
from collections.abc import Sequence

from unlora.errors import InputError


def parse_known(
    parser: argparse.ArgumentParser, words: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Return what the parser knows, and the words that it does not.

    Raises:
        InputError: a value is missing, or is none of those that are allowed.
    """
    try:
        return parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise InputError(f"{error}. Type: {parser.prog} --help") from error


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Return what the parser knows; every word has to be known.

    Raises:
        InputError: as :func:`parse_known`, or a word is not known.
    """
    args, strange = parse_known(parser, words)
    if strange:
        raise unusable(parser, strange[0])
    return args


def unusable(parser: argparse.ArgumentParser, word: str) -> InputError:
    """Return the error for a word that a command cannot use."""
    return InputError(f"{parser.prog} cannot use {word!r}. Type: {parser.prog} --help")
