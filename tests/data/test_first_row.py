"""``--plan`` shows what is read and what is scored, and reads no weights."""

import json

import pytest
import tiny
from bad_files import refuse_weights

from unlora.cli.main import main
from unlora.data.encoded import Encoded
from unlora.data.first_row import as_lines, pieces
from unlora.forward import IGNORE_INDEX


def test_a_row_is_shown_as_its_tokens():
    fast = tiny.tokenizer()
    ids = fast("hi\n<|user|>", add_special_tokens=False).input_ids
    parts = pieces(fast, Encoded(ids, [IGNORE_INDEX] * 2 + ids[2:]))
    assert parts == {"read": ["h", "i"], "scored": ["\n", "<|user|>"]}
    other = as_lines("mine", parts | {"gone on from": ["h"]})
    assert other.splitlines() == [
        "mine, the first row:",
        "  read             2  'h' 'i'",
        "  scored           2  '\\n' '<|user|>'",
        "  gone on from     1  'h'",
    ]
    assert as_lines("mine", parts | {"gone on from": ["h", "i"]}) == other.rpartition("\n")[0]
    long = as_lines("mine", {"read": ["a"] * 1000})
    assert "'a' ... 880 more ... 'a'" in long and len(long) < 700


@pytest.fixture
def folder(tmp_path, monkeypatch):
    tiny.llama(max_position_embeddings=512).save_pretrained(tmp_path / "root")
    tiny.tokenizer().save_pretrained(tmp_path / "root")
    rows = [{"messages": [{"role": "user", "content": "Who?"},
                          {"role": "assistant", "content": "Ana"}]}]  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)
    refuse_weights(monkeypatch)
    return tmp_path


SHOWN = (
    "'<|user|>' 'W' 'h' 'o' '?' '<|end|>' '\\n' '<|assistant|>'\n"
    "  scored           4  'A' 'n' 'a' '<|end|>'"
)


def test_a_training_shows_its_first_rows_and_stops(folder, capsys):
    words = ["data.forget=mine.json", "trainer=GradAscent", "model=root", "task_name=mine"]
    main(["unlearn", "experiment=unlearn/own/lora", *words, "--plan"])
    assert (
        f"data.forget (1 rows), the first row:\n  read             8  {SHOWN}"
        in capsys.readouterr().out
    )
    assert not (folder / "saves").exists()


@pytest.mark.slow
def test_a_fine_tuning_shows_its_rows_by_the_name_that_was_typed(folder, capsys):
    words = ["data.train=mine.json", "model=root", "task_name=mine"]
    main(["train", "experiment=finetune/own/lora", *words, "--plan"])
    out = capsys.readouterr().out
    assert "data.train (1 rows), the first row:\n" in out and "data.retain" not in out


@pytest.mark.slow
def test_an_evaluation_shows_its_first_rows(folder, capsys):
    main(["eval", "data.forget=mine.json", "model=root", "--plan"])
    assert f"forget, the first row:\n  read             8  {SHOWN}" in capsys.readouterr().out
    main(["eval", "data.forget=mine.json", "model=root", "--plan", "--json"])
    (score, write) = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert score["first"]["scored"] == ["A", "n", "a", "<|end|>"]
    assert write["first"]["gone on from"] == score["first"]["read"]


@pytest.mark.slow
def test_of_a_conversation_of_several_turns_each_answer_is_evaluated(folder, capsys):
    """Also where nobody has written the answers in other words."""
    (turns,) = json.loads((folder / "mine.json").read_text())
    rows = [{"messages": turns["messages"] * 2}]
    (folder / "mine.json").write_text(json.dumps(rows))
    main(["eval", "data.forget=mine.json", "model=root", "--plan", "--json"])
    planned = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [asked["rows"] for asked in planned] == [2, 2]
