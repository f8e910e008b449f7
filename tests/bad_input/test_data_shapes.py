"""Rows, folders and templates of other tools that are wrong, through the entry points."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from bad_files import (
    EVAL,
    FORGET,
    RETAIN,
    UNLEARN,
    lines,
    make_models,
    refuse_weights,
    refused,
    write_good_files,
)
from pyarrow import parquet

TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]
TEMPLATE = "model.template_args.apply_chat_template=true"
KWARGS = "model.template_args.chat_template_kwargs"
OPEN = "a cell begins with a double quote and does not end with one"


def table(**columns):
    """A parquet file of these columns."""
    written = pa.BufferOutputStream()
    parquet.write_table(pa.table(columns), written)
    return written.getvalue().to_pybytes()


def not_utf8():
    offsets, text = pa.array([0, 5], pa.int32()).buffers()[1], pa.py_buffer(b"ab\xffcd")
    bad = pa.Array.from_buffers(pa.string(), 1, [None, offsets, text])
    return table(question=bad, answer=["Ada."])


def turns(*messages):
    return lines({"messages": list(messages)})


# what is wrong: the file, its content, what is said
OF_A_FILE = {
    "a quote is open at the end": (
        "mine.csv", b'question,answer\nWho?,Ada.\nHow high?,"6 ft tall\nWhere?,Rome\n',
        f"mine.csv, line 3: {OPEN}"),
    "a quote is open up to the next one": (
        "mine.csv", b'question,answer\nA?,a\nB?,"b\nC?,c\nD?,d\nE?,"e"\n', f"line 3: {OPEN}"),
    "a quote is open after blank lines": (
        "mine.csv", b'question,answer\n\nA?,a\n\n\nB?,"b\n', f"line 6: {OPEN}"),
    "a quote is open after a cell of two lines": (
        "mine.csv", b'question,answer\n"A\n?",a\nB?,"b\n', f"line 4: {OPEN}"),
    "a quote is open in the header": ("mine.csv", b'question,"answer\nA?,a\n', f"line 1: {OPEN}"),
    "text follows a closing quote": ("mine.csv", b'question,answer\nA?,"a" b\n', f"line 2: {OPEN}"),
    "cells have tabs between them": (
        "mine.csv", b"question\tanswer\nA?\ta\n", "not a tab: save it with commas"),
    "parquet holds text that is not UTF-8": (
        "mine.parquet", not_utf8(), r"holds text that is not UTF-8: b'ab.xffcd'. Write its text"),
    "parquet holds bytes": (
        "mine.parquet", table(question=["A?"], answer=pa.array([b"a"])), "it must be text"),
    "parquet holds dates": (
        "mine.parquet", table(question=["A?"], answer=pa.array([0], pa.timestamp("s"))),
        "it must be text"),
    "parquet holds true and false": (
        "mine.parquet", table(question=["A?"], answer=[True]), "Row 0 has True .* must be text"),
    "parquet has turns of one speaker": (
        "mine.parquet", table(messages=[TURNS[:1]]), "a conversation of user. It must be"),
    "parquet has turns without a role": (
        "mine.parquet", table(messages=[[{"content": "Who?"}]]), "a turn of None; turns are of"),
    "parquet has texts for turns": (
        "mine.parquet", table(messages=[["Who?", "Ada."]]), "it must hold role and content"),
    "a conversation has no answer": (
        "mine.jsonl", turns(*TURNS, TURNS[0]), "of user, assistant, user. It must be a question"),
    "a conversation has no question": ("mine.jsonl", turns(TURNS[1]), "conversation of assistant"),
    "a conversation is empty": ("mine.jsonl", turns(), "a conversation of nothing"),
    "a conversation has tools": (
        "mine.jsonl", turns(*TURNS, {"role": "tool", "content": "x"}), "a turn of 'tool'"),
    "a conversation has a thought": (
        "mine.jsonl", turns(TURNS[0], TURNS[1] | {"thinking": "Hm"}), "a turn with thinking"),
    "a conversation has a picture": (
        "mine.jsonl", turns(TURNS[0] | {"content": [{"type": "image"}]}, TURNS[1]), "must be text"),
    "a conversation is text": (
        "mine.jsonl", lines({"messages": "Who? Ada."}), "a conversation of user. It must be"),
    "a conversation is an object": (
        "mine.jsonl", lines({"conversations": {"from": "human"}}), "should be, a list"),
    "a conversation has a question that is empty": (
        "mine.jsonl", turns(TURNS[0] | {"content": " "}, TURNS[1]), "an empty question|No row has"),
    "two conversations are in a row": (
        "mine.jsonl", lines({"messages": TURNS, "conversations": TURNS}),
        "more than one conversation each: messages or conversations. Leave all but one out"),
    "an instruction is none": (
        "mine.jsonl", lines({"instruction": None, "output": "Ada."}), "that is no text"),
    "an output is an object": (
        "mine.jsonl", lines({"instruction": "Who?", "output": {"text": "Ada."}}), "must be text"),
}  # fmt: skip
# what is wrong: what is typed beside good files, what is said
OF_A_COMMAND = {
    "one column for both": (EVAL, "question_key=answer", "are both 'answer'. Give the column of"),
    "one column for both, to train": (UNLEARN, "question_key=answer", "are both 'answer'. Give"),
    "the forget file as retain file": (
        EVAL, "data.retain=forget.jsonl", "All 3 rows of forget are in retain, too: the same"),
    "the forget file as retain file, to train": (
        UNLEARN, "data.retain=forget.jsonl", "All 3 rows of data.retain are also in data.forget"),
    "the forget file as holdout file": (
        EVAL, "data.holdout=forget.jsonl", "All 3 rows of forget are in holdout, too: no attack"),
    "the forget file as holdout file, to train": (
        UNLEARN, "data.holdout=forget.jsonl", "All 3 rows of forget are in holdout, too"),
    "more to write than the model reads": (
        EVAL, "eval.own.max_new_tokens=100000",
        "max_new_tokens is 100000, but the model reads 512 tokens, prompt and answer together"),
    "more to write, after a training": (
        UNLEARN, "eval.own.max_new_tokens=100000", "is 100000, but the model reads 512 tokens"),
    "no time to think": (
        EVAL, f"{TEMPLATE} {KWARGS}.enable_thinking=true model=thinker",
        "is to think before it answers .* and max_new_tokens is 200: .* to 2048, or at least"),
    "a variable that the template does not read": (
        UNLEARN, f"{TEMPLATE} {KWARGS}.enable_thinking=false", "Unknown variable of the chat temp"),
    "a mistyped variable": (
        EVAL, f"{TEMPLATE} {KWARGS}.enable_thinkin=true model=thinker",
        "Unknown variable of the chat template in chat_template_kwargs 'enable_thinkin'"),
    "text for a switch of the template": (
        EVAL, f"{TEMPLATE} {KWARGS}.enable_thinking=no_thanks model=thinker", "must be true or"),
    "a variable of ours": (
        EVAL, f"{TEMPLATE} {KWARGS}.add_generation_prompt=true", "is set by this program itself"),
    "variables that are no section": (EVAL, f"{KWARGS}=fast", "must be a section with keys"),
    "an unknown kind of words": (EVAL, "eval.own.rouge=asci", "Did you mean 'ascii'"),
    "a folder of two splits": (EVAL, "data.forget=splits", "has the splits one, two, and not 'tra"),
    "a folder of two splits, to train": (UNLEARN, "data.forget=splits", "Give one of its folders"),
    "a folder without data": (EVAL, "data.forget=saves", "which is a folder. Give one file: .j"),
    "a folder that is damaged": (
        UNLEARN, "data.forget=damaged", "is not a whole data set of save_to_disk"),
    "a folder of parts of which one is gone": (
        EVAL, "data.forget=parts", "the parts of 'train' are not whole: train-00000-of-00002"),
    "conversations of several turns to be answered otherwise": (
        ("alternates", *UNLEARN[1:2], "data.forget=turns.jsonl", "task_name=mine"), "",
        "conversations of several turns or with a system prompt"),
    "a plan of a file that is damaged": (
        UNLEARN, "data.forget=open.csv --plan", f"open.csv, line 2: {OPEN}"),
}  # fmt: skip
# what a chat template does
OF_A_TEMPLATE = {
    "includes a file": ("{% include 'other.jinja' %}", "cannot be used"),
    "counts too far": ("{% for i in range(999999999) %}{% endfor %}", "Range too big"),
    "raises": ("{{ raise_exception('no') }}", r"cannot be used \(no\)"),
    "divides by zero": ("{{ 1 / 0 }}", "division by zero"),
    "adds numbers to text": ("{{ messages[0].content + 1 }}", "cannot be used"),
    "leaves out the answer": ("{{ messages[0].content }}", "leaves out what the assistant says"),
    "leaves out the question": ("{{ messages[-1].role }}", "leaves out what the user says"),
    "answers in a thought": (
        "{% for m in messages %}<think>{{ m.content }}{% if 0 %}</think>{% endif %}{% endfor %}",
        "it puts the answer into a thought"),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_models(folder, adapters=False)
    return folder


@pytest.fixture
def check(models, tmp_path, capsys, monkeypatch):
    """Run a command in a folder of good data; weights are never read."""
    write_good_files(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    refuse_weights(monkeypatch)

    def check(command, more, expected):
        words = [word.replace("model=thinker", f"model={thinker(models)}") for word in more.split()]
        if not any(word.startswith("model=") for word in words):
            words.append(f"model={models / 'root'}")
        typed = {word.partition("=")[0] for word in words}
        kept = [word for word in command if word.partition("=")[0] not in typed]
        refused([*kept, *words], expected, capsys, monkeypatch)

    return check


def thinker(models: Path) -> Path:
    """A model whose template knows of thoughts."""
    return with_template(
        models, "{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' %}<think></think>"
        "{% endif %}{{ m.content }}<|end|>{% endfor %}{% if enable_thinking %} {% endif %}"
    )  # fmt: skip


def with_template(models: Path, template: str) -> Path:
    folder = models / f"model{len(list(models.iterdir()))}"
    folder.mkdir()
    for file in (models / "root").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("file, content, expected", OF_A_FILE.values(), ids=OF_A_FILE)
def test_a_file_of_another_tool_is_one_sentence(check, request, file, content, expected):
    Path(file).write_bytes(content)
    command = (UNLEARN, EVAL)[list(OF_A_FILE).index(request.node.callspec.id) % 2]
    check(command, f"data.forget={file}", expected)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("command, more, expected", OF_A_COMMAND.values(), ids=OF_A_COMMAND)
def test_data_that_do_not_go_together_are_one_sentence(check, command, more, expected):
    datasets.disable_progress_bars()
    one, two = datasets.Dataset.from_list(FORGET), datasets.Dataset.from_list(RETAIN)
    if "splits" in more:
        datasets.DatasetDict({"one": one, "two": two}).save_to_disk("splits")
    if "damaged" in more:
        one.save_to_disk("damaged")
        Path("damaged/state.json").write_text("{")
    Path("parts/data").mkdir(parents=True)
    parquet.write_table(pa.table({"question": ["A?"]}), "parts/data/train-00000-of-00002.parquet")
    Path("turns.jsonl").write_bytes(turns(*TURNS, *TURNS))
    Path("open.csv").write_text('question,answer\nA?,"a\n')
    check(command, more, expected)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("template, expected", OF_A_TEMPLATE.values(), ids=OF_A_TEMPLATE)
def test_a_template_that_cannot_be_used_is_one_sentence(check, models, template, expected):
    check(EVAL, f"model={with_template(models, template)}", expected)


def test_the_tables_hold_no_row_twice():
    seen = [
        json.dumps(row[1:], default=repr) for row in (*OF_A_FILE.values(), *OF_A_COMMAND.values())
    ]
    assert len(set(seen)) == len(seen)
