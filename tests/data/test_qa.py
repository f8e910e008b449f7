"""Questions and answers become rows; what is no text is refused, never trained on."""

import math

import pytest
from tiny import tokenizer

from unlora.data.chat_encoding import Chat
from unlora.data.qa import answers, refusals
from unlora.errors import InputError

ROW = {"question": "Who?", "answer": "Ana"}


@pytest.fixture(scope="module")
def chat():
    return Chat(tokenizer(), {})


def test_a_list_of_answers_gives_a_row_for_each(chat):
    found = answers([{"question": "Who?", "answer": ["Ana", "Rui"]}], chat)
    assert found == answers([ROW, {**ROW, "answer": "Rui"}], chat)


def test_a_number_is_its_text(chat):
    assert answers([{**ROW, "answer": 1950}], chat) == answers([{**ROW, "answer": "1950"}], chat)


@pytest.mark.parametrize(
    "value", [None, math.nan, True, {"text": "Ana"}, [], [None], ["Ana", ["Rui"]]]
)
@pytest.mark.parametrize("key", ["question", "answer"])
def test_what_is_no_text_is_refused(chat, key, value):
    with pytest.raises(InputError, match=f"Row 1 has .* in column '{key}'; it must be text"):
        answers([ROW, {**ROW, key: value}], chat)


def test_one_column_for_questions_and_answers_is_refused(chat):
    for make in (answers, lambda rows, chat, **keys: refusals(rows, chat, seed=0, **keys)):
        with pytest.raises(InputError, match="are both 'answer'. Give the column of questions"):
            make([ROW], chat, question_key="answer")


def test_an_empty_answer_is_refused(chat):
    with pytest.raises(InputError, match="is empty"):
        answers([{**ROW, "answer": " "}], chat)


def test_a_missing_column_names_those_that_are_there(chat):
    for make in (answers, lambda rows, chat: refusals(rows, chat, seed=0)):
        with pytest.raises(InputError, match="no column 'question'; it has: prompt, answer"):
            make([{"prompt": "Who?", "answer": "Ana"}], chat)


def test_refusals_follow_the_seed_and_the_file(chat, tmp_path):
    file = tmp_path / "idk.txt"
    file.write_text("No idea.\n\nAsk me another.\n", "utf-8")
    drawn = [refusals([ROW] * 20, chat, seed=seed, idk_path=str(file)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    lines = answers([{**ROW, "answer": x} for x in ("No idea.", "Ask me another.")], chat)
    assert all(row in lines for row in drawn[0])


def test_a_file_of_refusals_that_cannot_be_read_is_refused(chat, tmp_path):
    file = tmp_path / "idk.txt"
    for content, said in (
        (None, "cannot be read"),
        (b"\xff", "cannot be read"),
        (b"", "no refusal"),
    ):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(InputError, match=said):
            refusals([ROW], chat, seed=0, idk_path=str(file))
