"""Question-answer data sets as rows to train on."""

from collections.abc import Mapping, Sequence
from importlib import resources

import numpy as np

from unlora.data.chat import Chat, Encoded
from unlora.errors import InputError


def answers(
    rows: Sequence[Mapping[str, object]],
    chat: Chat,
    *,
    question_key: str = "question",
    answer_key: str = "answer",
    max_length: int = 512,
) -> list[Encoded]:
    """Every question with its answer; a list of answers gives one row for each.

    Raises:
        InputError: a column is missing, or a question or an answer is empty or no text.
    """
    encoded = []
    for number, row in enumerate(rows):
        for key in (question_key, answer_key):
            if key not in row:
                raise InputError(
                    f"Row {number} has no column {key!r}; it has: {', '.join(map(str, row))}. "
                    "Set question_key and answer_key to the columns of your data."
                )
        question, given = text_of(row[question_key], question_key, number), row[answer_key]
        if not question.strip():
            raise InputError(
                f"Row {number} has an empty question in column {question_key!r}. Give it one, or "
                "leave the row out."
            )
        # an empty list is refused as it is: its question would go missing
        for answer in given if isinstance(given, (list, tuple)) and given else [given]:
            text = text_of(answer, answer_key, number)
            encoded.append(chat.encode(question, text, max_length=max_length))
    return encoded


def text_of(value: object, key: str, number: int) -> str:
    """A text or a number as text; whatever else would be trained on as its name in Python."""
    if not isinstance(value, (str, int, float)) or value != value:
        raise InputError(
            f"Row {number} has {repr(value)[:80]} in column {key!r}; it must be text. Correct the "
            "row, or leave it out."
        )
    return str(value)


def refusals(
    rows: Sequence[Mapping[str, object]],
    chat: Chat,
    *,
    seed: int,
    question_key: str = "question",
    answer_key: str = "answer",
    max_length: int = 512,
    idk_path: str | None = None,
) -> list[Encoded]:
    """Every question with a way to say "I don't know", drawn with ``seed``.

    Args:
        idk_path: text file with one refusal a line; the ones of this package if not given.
    """
    if idk_path is None:
        text = resources.files("unlora.data").joinpath("refusals.txt").read_text("utf-8")
    else:
        try:
            with open(idk_path, encoding="utf-8") as file:
                text = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"idk_path {idk_path!r} cannot be read: {error}.") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(f"idk_path {idk_path!r} holds no refusal; it needs one a line.")
    drawn = np.random.default_rng(seed).integers(len(lines), size=len(rows))
    questions = [{**row, answer_key: lines[i]} for row, i in zip(rows, drawn, strict=True)]
    return answers(
        questions,
        chat,
        question_key=question_key,
        answer_key=answer_key,
        max_length=max_length,
    )
