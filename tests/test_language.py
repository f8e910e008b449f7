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
# names that do not say what they hold
NO_NOUNS = {"asked", "found", "given", "kept", "one", "place", "said"}
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


def locals_of(file: Path) -> list[tuple[int, str]]:
    """Every parameter and every name that a function, comprehension or module binds."""
    tree = ast.parse(file.read_text("utf-8"))
    fields = {
        id(statement.target)
        for block in ast.walk(tree)
        if isinstance(block, ast.ClassDef)
        for statement in block.body
        if isinstance(statement, ast.AnnAssign)
    }
    return [
        (node.lineno, node.arg if isinstance(node, ast.arg) else node.id)
        for node in ast.walk(tree)
        if isinstance(node, ast.arg)
        or (
            isinstance(node, ast.Name)
            and isinstance(node.ctx, ast.Store)
            and id(node) not in fields
        )
    ]


def test_a_local_name_is_the_noun_of_what_it_holds():
    wrong = [
        f"{file.relative_to(SRC)}:{line} names a value {name!r}, which does not say what it is.\n"
        f"No local or parameter is called any of {', '.join(sorted(NO_NOUNS))}.\n"
        "Name what it holds: rows, model, adapters, folder, match."
        for file in modules()
        for line, name in locals_of(file)
        if name in NO_NOUNS
    ]
    assert not wrong, "\n\n".join(wrong)
