"""Read question-answer data sets as rows to train on."""

import logging
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from unlora.data.chat_encoding import Chat, Encoded, Example
from unlora.data.conversations import as_questions
from unlora.data.template import Turns
from unlora.errors import InputError

logger = logging.getLogger(__name__)


def answers(
    rows: Sequence[dict[str, Any]],
    chat: Chat,
    *,
    question_key: str = "question",
    answer_key: str = "answer",
    max_length: int = 512,
    of: str = "",
    on_pairs: Callable[[list[Example]], object] | None = None,
) -> list[Encoded]:
    """Every question with its answer; a list of answers gives one row for each.

    Args:
        of: what messages call the data.
        on_pairs: is given the questions and answers as the data have them.

    Raises:
        InputError: a column is missing, or a question or an answer is empty or no text.
    """
    refuse_one_column(question_key, answer_key)
    questions = as_questions(rows, question_key, answer_key, of=of)
    pairs = read_pairs(questions, question_key, answer_key)
    if on_pairs:
        on_pairs(pairs)
    told = without_ends([answer for _, answer in pairs], chat, of=of)
    say_what_is_text([question for question, _ in pairs], told, chat, of=of)
    pairs = [(question, answer) for (question, _), answer in zip(pairs, told, strict=True)]
    return chat.encode_all(pairs, max_length=max_length, of=of)


def read_pairs(
    rows: Sequence[Mapping[str, object]], question_key: str, answer_key: str
) -> list[Example]:
    """Every question with each of its answers.

    Raises:
        InputError: a column is missing, or a question is empty, or something is no text.
    """
    pairs: list[Example] = []
    for number, row in enumerate(rows):
        for key in (question_key, answer_key):
            if key not in row:
                raise InputError(
                    f"Row {number} has no column {key!r}; it has: {', '.join(map(str, row))}. "
                    "Set question_key and answer_key to the columns of your data."
                )
        question, cell = question_of(row[question_key], question_key, number), row[answer_key]
        if not (question.question if isinstance(question, Turns) else question).strip():
            raise InputError(
                f"Row {number} has an empty question in column {question_key!r}. Give it one, or "
                "leave the row out."
            )
        # an empty list is refused as it is: its question would go missing
        for answer in cell if isinstance(cell, (list, tuple)) and cell else [cell]:
            pairs.append((question, text_of(answer, answer_key, number)))
    return pairs


def refuse_one_column(question_key: str, answer_key: str) -> None:
    """Raises InputError where the answer to a question would be the question."""
    if question_key == answer_key:
        raise InputError(
            f"question_key and answer_key are both {question_key!r}. Give the column of questions "
            "and the column of answers."
        )


def text_of(value: object, key: str, number: int) -> str:
    """A text or a number as text; whatever else would be trained on as its name in Python."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value != value:
        raise InputError(
            f"Row {number} has {repr(value)[:80]} in column {key!r}; it must be text. Correct the "
            "row, or leave it out."
        )
    return str(value)


def question_of(value: object, key: str, number: int) -> str | Turns:
    """A question, with what was said before it where it stands in a conversation."""
    return value if isinstance(value, Turns) else text_of(value, key, number)


def without_ends(texts: Sequence[str], chat: Chat, *, of: str = "") -> list[str]:
    """Answers without the end token that some of them bring: each gets exactly one.

    Raises:
        InputError: an answer holds the end of a thought, which the template writes itself.
    """
    ends = {chat.tokenizer.convert_ids_to_tokens(chat.end_id), chat.tokenizer.eos_token} - {None}
    thought = chat.template.thought
    shortened = []
    for text in texts:
        if thought and thought[1] in text:
            raise InputError(
                f"The answer {text[:80]!r} holds {thought[1]!r}, the end of a thought; the chat "
                "template writes thoughts itself, and only what comes after them is scored. Leave "
                "the thoughts out of your answers."
            )
        short = text.rstrip()
        while short.endswith(tuple(ends)):
            short = next(short.removesuffix(end) for end in ends if short.endswith(end)).rstrip()
        shortened.append(short if short != text.rstrip() else text)
    cut = sum(after != before for after, before in zip(shortened, texts, strict=True))
    if cut:
        logger.warning(
            "%s%d of %d answers end in the end token %s, which is left off: each gets one",
            f"{of}: " if of else "", cut, len(texts), " or ".join(sorted(ends)),
        )  # fmt: skip
    return shortened


def say_what_is_text(
    questions: Sequence[str | Turns], told: Sequence[str], chat: Chat, *, of: str = ""
) -> None:
    """Warn of control tokens in questions and answers, which are read as the letters they are."""
    examples = [
        match[0]
        for question, answer in zip(questions, told, strict=True)
        for text in [(f"{question!r}" if isinstance(question, Turns) else question) + answer]
        if (match := chat.control.first_in(text))
    ]
    if examples:
        logger.warning(
            "%s%d of %d rows hold control tokens such as %s; they are read as text",
            f"{of}: " if of else "", len(examples), len(told), examples[0],
        )  # fmt: skip


def refusals(
    rows: Sequence[dict[str, Any]],
    chat: Chat,
    *,
    seed: int,
    question_key: str = "question",
    answer_key: str = "answer",
    max_length: int = 512,
    idk_path: str | None = None,
    of: str = "",
) -> list[Encoded]:
    """Every question with a way to say "I don't know", drawn with ``seed``.

    Args:
        idk_path: text file with one refusal a line; the ones of this package if not given.
        of: what messages call the data.
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
    refuse_one_column(question_key, answer_key)
    prompts = as_questions(rows, question_key, answer_key, of=of)
    drawn = np.random.default_rng(seed).integers(len(lines), size=len(prompts))
    questions = [{**row, answer_key: lines[i]} for row, i in zip(prompts, drawn, strict=True)]
    pairs = read_pairs(questions, question_key, answer_key)
    return chat.encode_all(pairs, max_length=max_length, of=of)
