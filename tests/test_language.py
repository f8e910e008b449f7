"""Modules say what they do in the field's words: STYLE is in CONTRIBUTING.md."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
# the first word of a module that says what it is, and not what it does
NO_VERBS = {
    "a", "an", "the", "how", "what", "when", "where", "whether", "which", "who", "whose", "all",
    "answers", "data", "figures", "logs", "metrics", "random", "everything",
}  # fmt: skip
TEXT_COUNTS = {"base.py"}  # its text is a part of the name of the model that it makes
PHRASES = ("as it were", "so to speak", "voices", "make sense of")


def modules() -> list[Path]:
    return sorted(SRC.rglob("*.py"))


def first_line(file: Path) -> str:
    return (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").split("\n")[0]


@pytest.mark.parametrize("folder", sorted({file.parent for file in modules()}))
def test_the_first_line_of_a_module_says_what_it_does(folder):
    wrong = {
        file.name: line
        for file in sorted(folder.glob("*.py"))
        if file.name not in TEXT_COUNTS
        and (line := first_line(file))
        and line.split()[0].lower().strip(":,.") in NO_VERBS
    }
    assert not wrong


def test_phrases_that_say_nothing_are_nowhere():
    for file in modules():
        text = file.read_text("utf-8")
        assert not [phrase for phrase in PHRASES if phrase in text], file
