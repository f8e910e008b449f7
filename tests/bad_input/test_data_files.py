"""Files of data that are wrong, through the entry points: one sentence each, and nothing else."""

import json
import logging
import os
import shutil
import subprocess
import sys

import pyarrow as pa
import pytest
from bad_files import (
    EVAL,
    FORGET,
    RETAIN,
    UNLEARN,
    contents,
    lines,
    make_models,
    refuse_weights,
    refused,
    write_good_files,
)
from pyarrow import parquet
from tiny import tokenizer

from unlora.cli.main import main
from unlora.data import load_part, load_parts
from unlora.data.chat_encoding import Chat
from unlora.data.files import read_file
from unlora.data.text import chunks
from unlora.model import load_tokenizer, resolve_model

GOOD = FORGET[0]
JSONL = lines(*FORGET)
CUT = "Each line must hold one row as JSON, or the whole file one array of rows."
LATER = lambda **row: lines(GOOD, GOOD | row)  # noqa: E731


def as_parquet() -> bytes:
    written = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(FORGET), written)
    return written.getvalue().to_pybytes()


# file -> its content (None: it is not there; {}: it is a folder), and what is said of it
OF_A_FILE = {
    "it is not there": ("forgot.jsonl", None, "there is no such file. Did you mean 'forget.jsonl'"),
    "it is a folder": ("mine.jsonl", {}, "which is a folder. Give one file: .jsonl"),
    "it is empty": ("mine.jsonl", b"", "mine.jsonl holds no rows. Give a file with at least one"),
    "it holds blank lines": ("mine.jsonl", b"\n \n", "mine.jsonl holds no rows"),
    "its list is empty": ("mine.json", b"[]", "mine.json holds no rows"),
    "it has only a header": ("mine.csv", b"question,answer\n", "mine.csv holds no rows"),
    "it is of another kind": ("mine.xlsx", b"PK\3\4", "unknown kind; it must be one of .json"),
    "a CSV column is there twice": (
        "mine.csv", b"question,answer,answer\nWho?,Ada.,Ivo.\n",
        "its header holds 'answer' twice, .* Rename one, or leave it out"),
    "a JSON key is there twice": (
        "mine.jsonl", JSONL + b'{"question": "Who?", "answer": "Ada.", "answer": "Ivo."}\n',
        "mine.jsonl, line 4 holds 'answer' twice"),
    "a key of an array is there twice": (
        "mine.json", b'[{"question": "Who?", "answer": "Ada.",\n "answer": "Ivo."}]',
        "mine.json, a row holds 'answer' twice"),
    "a CSV row has too many cells": (
        "mine.csv", b"question,answer\nWho?,Ada, of course.\n",
        "row 1 has more cells than the header has names. Put double quotes around text"),
    "it is Latin-1": ("mine.jsonl", '{"question": "Où?", "answer": "Ici."}'.encode("latin-1"),
                      r"mine.jsonl is not UTF-8 text \(byte 15\). Save it as UTF-8"),
    "it is UTF-16": ("mine.csv", "question,answer\nWho?,Ada.\n".encode("utf-16"),
                     r"is not UTF-8 text \(byte 0\). Save it as UTF-8"),
    "it is UTF-16 without its mark": (
        "mine.csv", "question,answer\nWho?,Ada.\n".encode("utf-16-le"),
        "character 1 is a zero.* Save it as UTF-8"),
    "it is binary": ("mine.jsonl", bytes(range(1, 256)), r"is not UTF-8 text \(byte 127\)"),
    "a crash left zeros": ("mine.jsonl", JSONL + bytes(64), "is a zero.* write it again"),
    "an archive is called CSV": ("mine.csv", b"\x1f\x8b\x08\0\0\0", "is not UTF-8 text"),
    "its array is cut short": ("mine.json", json.dumps(FORGET, indent=1).encode()[:-20],
                               "mine.json, line 12: .* The file begins as one array of rows; is"),
    "its last line is half written": ("mine.jsonl", JSONL[:-20], f"line 3: Unterminated.* {CUT}"),
    "its rows are lists": ("mine.jsonl", b'[["Who?", "Ada."]]', "row 1 is .* must be an object"),
    "its rows are texts": ("mine.jsonl", b'"Who? Ada."\n', "row 1 is 'Who.* must be an object"),
    "it is nested too deep": ("mine.jsonl", b"[" * 100_000, "line 1 is nested too deep"),
    "it holds half a character": ("mine.jsonl", b'{"question": "Who \\ud83d?", "answer": "Ada."}',
                                  "row 1 holds half a character .* leave the row out"),
    "a number is too long": ("mine.jsonl", b'{"question": "?", "answer": ' + b"9" * 5000 + b"}",
                             "line 1 holds a number of too many digits. Put double quotes"),
    "it is called parquet": ("mine.parquet", b"PAR1xxxx", "is not a whole parquet file"),
    "parquet is half written": ("mine.parquet", as_parquet()[:-30], "is not a whole parquet file"),
}  # fmt: skip

# what is said of rows that an objective is to learn from
OF_A_ROW = {
    "no column of questions": (lines({"prompt": "Who?", "answer": "Ada."}),
                               "no column 'question'; it has: prompt, answer. Set question_key"),
    "a later row has no answer": (lines(GOOD, {"question": "Who?"}),
                                  "Row 1 has no column 'answer'; it has: question"),
    "an empty answer": (LATER(answer=" "), "The answer to .* is empty.* leave the row out"),
    "an empty question": (LATER(question=""), "Row 1 has an empty question .* leave the row out"),
    "null": (LATER(answer=None), "Row 1 has None in column 'answer'; it must be text. Correct"),
    "an object": (LATER(answer={"text": "Ada."}), "Row 1 has {'text'.*; it must be text"),
    "a question of several": (LATER(question=["Who?", "Who?"]), "'question'; it must be text"),
    "an empty list": (LATER(answer=[]), r"Row 1 has \[\] in column 'answer'; it must be text"),
    "what is not a number": (LATER(answer=float("nan")), "Row 1 has nan in column 'answer'"),
    "the rows to be kept": (lines(*RETAIN), "All 2 rows of data.retain are also in data.forget"),
}  # fmt: skip

# what is said of rows that a model is only asked about; there holes are counted, not refused
OF_A_QUESTION = {
    "no column of answers": (lines({"question": "Who?", "reply": "Ada."}),
                             "Known: question, reply. Set eval.own.answer_key=COLUMN"),
    "answers that are all empty": (lines(GOOD | {"answer": " "}, GOOD | {"answer": None}),
                                   "No row has anything in its column 'answer'. Fill it"),
    "an object": (LATER(answer={"text": "Ada."}), "Row 1 has {'text'.* in column 'answer'"),
    "a question of several": (LATER(question=["Who?"]), "Row 1 has .* in column 'question'"),
    "several answers": (lines(GOOD | {"answer": ["Ada.", "Ivo."]}), "wants one answer per row"),
    "a perturbed answer that is an object": (
        lines(GOOD | {"perturbed_answer": [{"text": "Ivo."}]}), "in column 'perturbed_answer'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_models(folder, adapters=False)
    return folder


@pytest.fixture
def check(models, tmp_path, capsys, monkeypatch):
    """Run a command on a wrong file; the data beside it are good, and weights are never read."""
    place = tmp_path / "here"
    write_good_files(place)
    monkeypatch.chdir(place)
    refuse_weights(monkeypatch)

    def check(command, file, content, expected):
        if content == {}:
            (place / file).mkdir()
        elif content is not None:
            (place / file).write_bytes(content)
        words = [word for word in command if not word.startswith("data.forget=")]
        words += [f"model={models / 'root'}", f"data.forget={file}"]
        refused(words, expected, capsys, monkeypatch)

    return check


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("file, content, expected", OF_A_FILE.values(), ids=OF_A_FILE)
def test_a_file_that_cannot_be_read_is_one_sentence(check, request, file, content, expected):
    # one and the other, in turn: both read files in one place
    command = (UNLEARN, EVAL)[list(OF_A_FILE).index(request.node.callspec.id) % 2]
    check(command, file, content, expected)


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("content, expected", OF_A_ROW.values(), ids=OF_A_ROW)
def test_a_row_that_cannot_be_learned_is_one_sentence(check, content, expected):
    check(UNLEARN, "mine.jsonl", content, expected)


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("content, expected", OF_A_QUESTION.values(), ids=OF_A_QUESTION)
def test_a_row_that_cannot_be_asked_about_is_one_sentence(check, content, expected):
    check(EVAL, "mine.jsonl", content, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name, expected", [("forgot.jsonl", "no such file"),
                                            ("mine.jsonl", "not UTF-8 text")])  # fmt: skip
def test_a_process_ends_with_code_2_and_one_sentence(models, tmp_path, name, expected):
    write_good_files(tmp_path)
    (tmp_path / "mine.jsonl").write_bytes(b"\xff")
    before = contents(tmp_path)
    words = [*EVAL, f"model={models / 'root'}", f"data.forget={name}", "--json"]
    ended = subprocess.run(
        [sys.executable, "-m", "unlora", *[x for x in words if x != "data.forget=forget.jsonl"]],
        cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 2 and ended.stdout == ""
    said = [line for line in ended.stderr.splitlines() if "is asked in this template" not in line]
    assert len(said) == 1 and expected in said[0], ended.stderr
    assert contents(tmp_path) == before


# --- what is no mistake, and is said ------------------------------------------------------------


def test_marks_and_unnamed_columns_are_read(tmp_path):
    told = ",question,answer\n0,Who?,Ada.\n"  # as pandas writes an index
    (tmp_path / "mine.csv").write_bytes(told.encode("utf-8-sig"))
    assert [row["answer"] for row in read_file(tmp_path / "mine.csv")] == ["Ada."]


def test_rows_that_are_longer_than_the_model_reads_are_cut_and_counted(models, tmp_path, caplog):
    """The data set allows 512 tokens; this model has 64 positions."""
    folder = tmp_path / "short"
    shutil.copytree(models / "root", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    (tmp_path / "mine.jsonl").write_bytes(lines(GOOD, GOOD | {"answer": "bees " * 50}))
    source = {"handler": "QADataset", "args": {"hf_args": {"path": str(tmp_path / "mine.jsonl")}}}
    rows = {}
    for name in ("root", "short"):
        model = {"model_args": {"pretrained_model_name_or_path": str(tmp_path / name)}}
        if name == "root":
            model = {"model_args": {"pretrained_model_name_or_path": str(models / name)}}
        chat = Chat(load_tokenizer(resolve_model(model)), {})
        with caplog.at_level(logging.INFO):
            rows[name] = load_part({"mine": source}, chat)
    assert [max(len(row.input_ids) for row in found) for found in rows.values()] == [270, 64]
    assert [row.cut for row in rows["short"]] == [0, 206]
    assert "mine: 2 rows, 1 of them cut to the maximal length" in caplog.text
    # text without questions is cut into rows of that length
    texts = chunks(chat.control, ["bees " * 50], max_length=512)
    assert max(len(row.input_ids) for row in texts) == 64


def test_rows_that_are_kept_and_forgotten_are_counted(models, tmp_path, caplog):
    parts = {}
    for name, found in (("forget", FORGET), ("retain", [*RETAIN, GOOD])):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(*found))
        hf_args = {"path": str(tmp_path / f"{name}.jsonl")}
        parts[name] = {"mine": {"handler": "QADataset", "args": {"hf_args": hf_args}}}
    load_parts(parts, Chat(tokenizer(), {}), ("forget", "retain"), seed=0)
    assert "1 of 3 rows of data.retain are in data.forget, too" in caplog.text


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("row", [{}, {"perturbed_answer": []}, {"perturbed_answer": None}])
def test_without_perturbed_answers_their_figures_say_so(models, tmp_path, monkeypatch, capsys, row):
    write_good_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    refuse_weights(monkeypatch)
    (tmp_path / "forget.jsonl").write_bytes(lines(*[good | row for good in FORGET]))
    main([*EVAL, f"model={models / 'root'}", "--plan"])
    why = "nothing in its column" if row else "no column"
    said = f"the data set forget_perturbed has {why} 'perturbed_answer': give every row"
    assert said in capsys.readouterr().out
