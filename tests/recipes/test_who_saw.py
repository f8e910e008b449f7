"""Which runs were trained on given rows: by their hashes, their data, or nobody knows."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from unlora.cli.main import main
from unlora.recipes.who_saw import find_rows, row_hashes, who_saw
from unlora.runs.row_hashes import write_row_hashes

TOFU = Path(os.environ.get("UNLORA_REALDATA", "nowhere"), "tofu")


def qa(n):
    return {"question": f"Who lives in house {n}?", "answer": f"In house {n} lives person {n * 7}."}


def run(folder, start, part="train", hashed=(), data=()):
    """A run folder as training leaves it, without a model."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    declared = {"X": {"handler": "QADataset", "args": {"hf_args": {"path": f"{folder}.json"}}}}
    config = {
        "mode": folder.parent.name,
        "model": {"model_args": {"pretrained_model_name_or_path": start}},
        "data": {part: declared},
    }
    (folder / "run_config.json").write_text(json.dumps(config))
    manifest = {"data": {"retain": {"rows": len(hashed) or len(data)}}}
    if hashed:
        texts = [(row["question"], row["answer"]) for row in hashed]
        manifest["row_hashes"] = write_row_hashes(folder, {part: texts})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if data:
        Path(f"{folder}.json").write_text(json.dumps(list(data)))


@pytest.fixture
def saves(tmp_path, monkeypatch):
    """A lineage of three runs, the first without hashes; and a run whose data are gone."""
    monkeypatch.chdir(tmp_path)
    run("saves/finetune/full", "owner/root", data=[qa(n) for n in range(4)])
    run("saves/finetune/more", "saves/finetune/full", hashed=[qa(4), qa(5)])
    run("saves/unlearn/npo", "saves/finetune/more", part="forget", hashed=[qa(4)])
    run("saves/finetune/lost", "owner/root")
    return tmp_path / "saves"


def test_a_run_is_asked_with_all_that_it_was_made_from(saves):
    answer = who_saw([qa(0), qa(4), qa(9)], ["saves/unlearn/npo"])
    found = [[(str(x.link), x.part, x.match) for x in row] for row in answer.rows]
    assert found == [
        [("saves/finetune/full", "train", "exact")],
        [("saves/unlearn/npo", "forget", "exact"), ("saves/finetune/more", "train", "exact")],
        [],
    ]
    assert answer.links("train") == [Path("saves/finetune/full"), Path("saves/finetune/more")]
    assert answer.roots == ("owner/root",) and not answer.unknown


def test_what_cannot_be_told_is_named(saves):
    answer = who_saw([qa(0)], ["saves"])
    assert [str(x.link) for x in answer.unknown] == ["saves/finetune/lost"]
    assert "it has no row hashes, and its data cannot be read: There is no" in answer.unknown[0].why
    (saves / "finetune" / "full.json").write_text(json.dumps([qa(0)]))
    why = who_saw([qa(0)], ["saves/finetune/full"]).unknown[0].why
    assert "its train data have 1 rows now, and had 4 when it was trained" in why
    (saves / ".row_hash_key").unlink()
    assert "made with another key" in who_saw([qa(4)], ["saves/finetune/more"]).unknown[0].why
    shutil.rmtree(saves / "finetune" / "full")
    gone = who_saw([qa(0)], ["saves/finetune/more"]).unknown[-1]
    assert (str(gone.link), gone.why) == ("saves/finetune/full", "its folder is not there")


def test_rows_of_a_data_set_are_found(saves):
    rows = [qa(1), {"question": "who lives in HOUSE 2", "answer": "in house 2 lives person 14"}]
    assert find_rows([qa(1), qa(2)], [*rows, qa(3)]) == ["exact", "near", None]
    chat = [{"messages": [{"role": "user", "content": qa(1)["question"]},
                          {"role": "assistant", "content": qa(1)["answer"]}]}]  # fmt: skip
    assert find_rows([qa(1)], chat) == ["exact"]
    text = "Ana lived in the old house by the river. It was sold to her friend in May 1961. Rain."
    assert find_rows([{"text": text}], [{"text": f"Long before. {text} And so on it went."}]) == [
        "near"
    ]
    assert row_hashes([qa(1), qa(2)], "saves/run") == row_hashes([qa(1), qa(2)], "saves/other")


def test_the_command_prints_a_table_and_json(saves, capsys):
    Path("rows.jsonl").write_text("\n".join(json.dumps(qa(n)) for n in (0, 4, 9)))
    main(["who-saw", "rows.jsonl"])
    lines = capsys.readouterr().out
    assert "row 3: nobody saw it" in lines and "2 of 3 rows were seen; runs: 4." in lines
    assert (
        "saves/finetune/full  train   1      0     saves/finetune/more, saves/unlearn/npo" in lines
    )
    assert "Unknown: saves/finetune/lost: it has no row hashes" in lines
    assert "Nobody can tell what the root model owner/root was trained on." in lines
    main(["who-saw", "rows.jsonl", "saves/unlearn/npo", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert [x["match"] for x in answer["rows"][0]] == ["exact"] and answer["rows"][2] == []


@pytest.mark.parametrize("words, said", [
    ([], "Which rows?"),
    (["none.jsonl"], "There is no file 'none.jsonl'"),
    (["rows.jsonl", "nowhere"], "There is no run in 'nowhere'"),
    (["rows.jsonl", "--fast"], "cannot use '--fast'"),
    (["rows.jsonl", "--text-key"], "expected one argument"),
    (["rows.jsonl", "--question-key", "q"], "no question and answer in columns 'q' and 'answer'"),
    (["empty.jsonl"], "holds no rows"),
    (["broken.jsonl"], "line 1"),
    (["numbers.jsonl"], "a row must be an object"),
    (["half.jsonl"], "no question and answer in columns 'question' and 'answer'"),
])  # fmt: skip
def test_wrong_words_end_in_one_sentence(saves, capsys, words, said):
    texts = {"rows": json.dumps(qa(0)), "empty": "", "broken": '{"question":', "numbers": "3",
             "half": '{"question": "Who?"}'}  # fmt: skip
    for name, text in texts.items():
        Path(f"{name}.jsonl").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["who-saw", *words])
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not TOFU.is_dir(), reason="needs UNLORA_REALDATA")
def test_tofu_rows_are_found_and_no_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in (TOFU / "full.json").read_text("utf-8").splitlines()]
    half, others = rows[:2000], rows[2000:]
    run("saves/finetune/half", "owner/root", hashed=half)
    draw = random.Random(0)

    def edited(row):
        words = row["answer"].split()
        words[draw.randrange(len(words))] = "zebra"
        return {**row, "answer": " ".join(words)}

    def share(wanted):
        return sum(map(bool, who_saw(wanted, ["saves"]).rows)) / len(wanted)

    assert share(half) == 1 and share([{**r, "answer": r["answer"].upper()} for r in half]) == 1
    assert share([edited(row) for row in half]) >= 0.95
    assert share(others) == 0
