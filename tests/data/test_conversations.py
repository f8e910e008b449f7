"""Rows as other tools write them are read as what they mean, or refused in a sentence."""

import logging

import pytest
from pyarrow import Table, parquet
from tiny import tokenizer

from unlora.data.chat_encoding import Chat
from unlora.data.conversations import as_questions
from unlora.data.qa import answers, refusals
from unlora.data.rows import load_rows
from unlora.data.template import Turns
from unlora.errors import InputError
from unlora.evals.datasets import Source

NAMES = {"system": "system", "user": "human", "assistant": "gpt"}


def said(*texts, system=None):
    """``messages`` of a user and an assistant in turn."""
    roles = ["user", "assistant"] * len(texts)
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return [{"role": "system", "content": system}] * (system is not None) + turns


def shared(*texts, system=None):
    """The same as ShareGPT writes it."""
    turns = said(*texts, system=system)
    return [{"from": NAMES[turn["role"]], "value": turn["content"]} for turn in turns]


def read(*rows, answer_key="answer"):
    found = as_questions(rows, "question", answer_key)
    return [(row["question"], row.get(answer_key)) for row in found]


PARTS = [
    {"role": "user", "content": [{"type": "text", "text": text} for text in ("W", "ho?")]},
    {"role": "assistant", "content": [{"type": "text", "text": "Ana"}]},
]
ALIKE = {
    "messages": {"messages": said("Who?", "Ana")},
    "ShareGPT": {"conversations": shared("Who?", "Ana")},
    "conversations of roles": {"conversations": said("Who?", "Ana")},
    "one conversation": {"conversation": said("Who?", "Ana")},
    "JSON in a cell": {"messages": '[{"role": "user", "content": "Who?"}, '
                                   '{"role": "assistant", "content": "Ana"}]'},
    "parts": {"messages": PARTS},
    "Alpaca": {"instruction": "Who?", "output": "Ana"},
    "Alpaca with an empty input": {"instruction": "Who?", "input": " ", "output": "Ana"},
    "prompt and completion": {"prompt": "Who?", "completion": "Ana"},
    "prompt and completion of turns": {"prompt": said("Who?"),
                                       "completion": [{"role": "assistant", "content": "Ana"}]},
    "keys that say nothing": {"messages": [{"role": "user", "content": "Who?", "name": "me"},
                                           {"role": "assistant", "content": "Ana", "weight": 1,
                                            "tool_calls": None}]},
}  # fmt: skip


@pytest.mark.parametrize("row", ALIKE.values(), ids=ALIKE)
def test_shapes_are_recognised(row):
    assert read(row) == [("Who?", "Ana")]


def test_rows_with_the_named_columns_are_as_they_are():
    row = {"question": "Who?", "answer": "Ana", "messages": said("When?", "1950")}
    assert as_questions([row], "question", "answer") == [row]
    other = {"text": "Who?", "reply": "Ana"}
    assert as_questions([other], "question", "answer") == [other]


def test_every_answer_of_a_conversation_is_a_row_after_what_was_said_before():
    row = {"messages": said("Who?", "Ana", "When?", "1950", "Where?", "Rome", system="Be brief.")}
    assert read(row) == [
        (Turns("Who?", (), "Be brief."), "Ana"),
        (Turns("When?", (("Who?", "Ana"),), "Be brief."), "1950"),
        (Turns("Where?", (("Who?", "Ana"), ("When?", "1950")), "Be brief."), "Rome"),
    ]


def test_an_input_stands_behind_its_instruction(caplog):
    rows = [
        {"instruction": "Translate.", "input": text, "output": "x"} for text in ("Tag", "", None)
    ]
    wanted = ["Translate.\nTag", "Translate.", "Translate."]
    with caplog.at_level(logging.INFO):
        assert [question for question, _ in read(*rows)] == wanted
    assert "the question is the column 'instruction', its column 'input' behind it" in caplog.text
    named = as_questions(rows, "instruction", "output")
    assert [row["instruction"] for row in named] == wanted


def test_alpaca_may_have_a_system_prompt_and_a_history():
    row = {"instruction": "When?", "input": "", "output": "1950", "system": "Be brief.",
           "history": [["Who?", "Ana"]]}  # fmt: skip
    assert read(row) == [(Turns("When?", (("Who?", "Ana"),), "Be brief."), "1950")]


def test_training_and_evaluation_see_the_same_rows(tmp_path):
    rows = [{"messages": said("Who?", "Ana", "When?", "1950", system="Be brief.")},
            {"messages": said("Where?", "Rome")}]  # fmt: skip
    parquet.write_table(Table.from_pylist(rows), tmp_path / "mine.parquet")
    chat = Chat(tokenizer(), {"apply_chat_template": True})
    loaded = load_rows(str(tmp_path / "mine.parquet"))
    trained = answers(loaded, chat)
    config = {"handler": "QADataset", "hf_args": {}, "question_key": "question",
              "answer_key": "answer", "needed": {}}  # fmt: skip
    source = Source("forget", config, chat, lambda: loaded)
    assert [row[0] for row in source.answers] == trained and len(trained) == 3
    text = chat.tokenizer.decode(trained[1].input_ids)
    assert text == (
        "<|system|>Be brief.<|end|>\n<|user|>Who?<|end|>\n<|assistant|>Ana<|end|>\n"
        "<|user|>When?<|end|>\n<|assistant|>1950<|end|>"
    )
    assert [row.prompt_length for row in trained] == [len(prompt) for prompt in source.prompts]
    # refusals, too, one to each question
    asked = [row.input_ids[: row.prompt_length] for row in trained]
    found = refusals(loaded, chat, seed=0)
    assert [row.input_ids[: row.prompt_length] for row in found] == asked


def test_a_conversation_may_be_asked_in_a_format():
    config = {"handler": "QADataset", "hf_args": {}, "question_key": "question",
              "answer_key": "answer", "question_format": "Now: {}"}  # fmt: skip
    rows = [{"messages": said("Who?", "Ana", "When?", "1950")}]
    source = Source("forget", config, Chat(tokenizer(), {}), lambda: rows)
    assert source.rows[1]["question"] == Turns("Now: When?", (("Who?", "Ana"),))


def test_another_answer_to_a_conversation_is_not_its_own():
    row = {"messages": said("Who?", "Ana"), "paraphrased_answer": "By Ana"}
    assert read(row, answer_key="paraphrased_answer") == [("Who?", "By Ana")]
    assert read({"messages": said("Who?", "Ana")}, answer_key="paraphrased_answer") == [
        ("Who?", None)
    ]


TURN = {"role": "user", "content": "Who?"}
REFUSED = {
    # what is wrong, the row, what is said
    "two conversations": (
        {"messages": said("Who?", "Ana"), "conversations": shared("When?", "1950")},
        "more than one conversation each: messages or conversations"),
    "a conversation and an instruction": (
        {"messages": said("Who?", "Ana"), "instruction": "Who?", "output": "Ana"},
        "messages or instruction and output"),
    "no answer": ({"messages": said("Who?")}, "Row 0 has a conversation of user. It must be a"),
    "a question at the end": (
        {"messages": said("Who?", "Ana", "When?")}, "of user, assistant, user. It must be"),
    "an answer first": ({"messages": said("Who?", "Ana")[1:]}, "a conversation of assistant"),
    "two questions": ({"messages": [TURN, *said("Who?", "Ana")]}, "of user, user, assistant"),
    "a system prompt in the middle": (
        {"messages": [*said("Who?", "Ana"), *said("When?", "1950", system="x")]},
        "user, assistant, system, user, assistant"),
    "nothing": ({"messages": []}, "a conversation of nothing"),
    "null": ({"messages": None}, "has None where its conversation should be, a list"),
    "an object": ({"messages": {"role": "user"}}, "where its conversation should be, a list"),
    "text": ({"messages": "Who? Ana"}, "a conversation of user. It must be"),
    "broken JSON": ({"messages": "[{]"}, "a conversation of user"),
    "texts": ({"messages": ["Who?", "Ana"]}, "has 'Who.' as a turn; it must hold role and content"),
    "another role": (
        {"messages": [TURN, {"role": "tool", "content": "x"}]}, "a turn of 'tool'; turns are of"),
    "no role": ({"messages": [{"content": "Who?"}]}, "a turn of None; turns are of"),
    "no content": ({"messages": [{"role": "user"}]}, "a turn that says None; it must be text"),
    "a number": ({"messages": [{"role": "user", "content": 3}]}, "a turn that says 3; it must"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
        "it must be text. Leave the row out"),
    "tool calls": (
        {"messages": [TURN, {"role": "assistant", "content": "x", "tool_calls": [{"id": 1}]}]},
        "a turn with tool_calls, which is not read"),
    "a thought": (
        {"messages": [TURN, {"role": "assistant", "content": "x", "reasoning_content": "Hm"}]},
        "a turn with reasoning_content, which is not read"),
    "a turn that is not to be learned": (
        {"messages": [TURN, {"role": "assistant", "content": "x", "weight": 0}]}, "with weight"),
    "tools": ({"messages": said("Who?", "Ana"), "tools": [{"name": "x"}]}, "has tools, which are"),
    "an instruction that is a list": (
        {"instruction": ["Who?"], "output": "Ana"}, "an instruction or an input that is no text"),
    "an input that is a number": (
        {"instruction": "Who?", "input": 3, "output": "Ana"}, "an input that is no text"),
    "a prompt of turns alone": (
        {"prompt": said("Who?"), "completion": None}, "has None where its conversation should be"),
}  # fmt: skip


@pytest.mark.parametrize("row, expected", REFUSED.values(), ids=REFUSED)
def test_what_is_no_conversation_is_one_sentence(row, expected):
    with pytest.raises(InputError, match=expected) as error:
        as_questions([row], "question", "answer")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_one_other_answer_does_not_fit_a_conversation_of_several():
    row = {"messages": said("Who?", "Ana", "When?", "1950"), "paraphrased_answer": "By Ana"}
    with pytest.raises(InputError, match="2 answers in its conversation and one in its column"):
        read(row, answer_key="paraphrased_answer")


def test_tags_have_no_place_for_the_system_prompt_of_a_row():
    row = {"messages": said("Who?", "Ana", system="Be brief.")}
    with pytest.raises(InputError, match="the template by tags has no place for it"):
        answers([row], Chat(tokenizer(), {}))
