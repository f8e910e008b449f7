"""Files that a user brings may lack columns, cells and each other."""

import pandas as pd
import pytest

from unlora.data.chat_encoding import Chat
from unlora.data.rows import load_rows
from unlora.errors import InputError
from unlora.evals.datasets import Source
from unlora.evals.own import not_given, whole, without_column

COLUMNS = {"question_key": "question", "answer_key": "answer"}
TAGS = {"user_start_tag": "Q: ", "asst_start_tag": "A: "}
CONFIG = {"handler": "QADataset", "hf_args": {"path": "my.csv"}, **COLUMNS}


def source(tokenizer, rows, **config):
    return Source("forget", {**CONFIG, **config}, Chat(tokenizer, TAGS), lambda **_: list(rows))


@pytest.mark.parametrize(
    "cell, listed",
    [
        (None, []),
        (" ", []),
        ("so", ["so"]),
        ('["so", "or so"]', ["so", "or so"]),
        ("[sic] so", ["[sic] so"]),
        (["so", "or so"], ["so", "or so"]),
        (3, [3]),
    ],
)
def test_a_cell_of_several_answers_is_a_list(cell, listed):
    rows = whole([{"q": "Who?", "a": cell}], ["q", "a"], several=True)
    assert rows == [{"q": "Who?", "a": listed}]


def test_rows_get_all_columns_and_keep_the_others():
    rows = [{"q": "Who?", "x": 1}, {"q": None, "a": "Ada"}, {"q": 0, "a": 0}]
    assert whole(rows, ["q", "a"]) == [
        {"q": "Who?", "a": None, "x": 1},
        {"q": "", "a": ""},
        {"q": 0, "a": 0},
    ]


def test_only_an_optional_file_may_be_left_out():
    config = {"hf_args": {"path": None}, "optional": {"hf_args": "give x=FILE"}}
    assert not_given("new", config) == "the data set new is not there: give x=FILE"
    assert not_given("new", {**config, "hf_args": {"path": "x"}}) is None
    assert not_given("new", {**config, "optional": {"answer_key": "y"}}) is None


def test_a_column_is_there_if_one_row_has_it():
    config = {"needed": {"answer_key": "Set a."}}
    assert without_column("x", config, COLUMNS, [{"question": 1}, {"answer": 1}]) is None
    with pytest.raises(InputError, match=r"Unknown column 'answer'\..* Known: question\. Set a\."):
        without_column("x", config, COLUMNS, [{"question": 1}])
    optional = {"optional": {"answer_key": "add it"}}
    why = without_column("x", optional, COLUMNS, [{"question": 1}])
    assert why == "the data set x has no column 'answer': add it"
    # a benchmark says what is missing in its own way
    assert without_column("x", {}, COLUMNS, [{"question": 1}]) is None


def test_a_row_without_an_answer_has_no_scored_token(tokenizer):
    rows = [{"question": "Who?", "answer": "Ada"}, {"question": "Who?"}, {"answer": "Ada"},
            {"question": "Who?", "answer": None}]  # fmt: skip
    made = source(tokenizer, rows, needed={"answer_key": "x"})
    assert [len(answers[0].input_ids) > 0 for answers in made.answers] == [
        True,
        False,
        False,
        False,
    ]
    assert made.references == ["Ada", "", "", ""] and all(made.prompts) and made.missing is None
    assert source(tokenizer, rows).absent == ["question", "answer"]  # of a benchmark's


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_says_the_same(tokenizer, tmp_path, kind):
    rows = [
        {"question": 'Who, "and" where?', "answer": "Ada,\nat home."},
        {"question": "And then?", "answer": None},
        {"question": "Кто?", "answer": "7"},
    ]
    file = tmp_path / f"my.{kind}"
    if kind == "csv":
        pd.DataFrame(rows).to_csv(file, index=False)
    elif kind == "parquet":
        pd.DataFrame(rows).to_parquet(file)
    else:
        pd.DataFrame(rows).to_json(file, orient="records", lines=kind == "jsonl")
    config = {**CONFIG, "hf_args": {"path": str(file)}, "needed": {"answer_key": "x"}}
    read = Source("forget", config, Chat(tokenizer, TAGS), load_rows)
    assert [*read.answers] == [*source(tokenizer, rows, needed={"answer_key": "x"}).answers]
    assert [len(answers[0].input_ids) > 0 for answers in read.answers] == [True, False, True]


def test_an_absent_answer_is_not_the_word_none(tokenizer):
    rows = [{"question": "Who?", "answer": None}, {"question": "Who?", "answer": "None"}]
    made = source(tokenizer, rows)
    assert made.references == ["", "None"]


def test_missing_data_have_no_rows(tokenizer):
    rows = [{"question": "Who?", "answer": "Ada"}]
    made = source(tokenizer, rows, answer_key="other", optional={"answer_key": "add it"})
    assert made.missing == "the data set forget has no column 'other': add it"
    assert len(made) == 0 and made.absent == []
    assert len(source(tokenizer, rows, optional={"answer_key": "add it"})) == 1
