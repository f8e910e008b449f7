"""Rows that were seen at any place of a lineage, and running text."""

import shutil
from pathlib import Path

import pytest
from deletion_runs import (
    MODEL,
    QUICK,
    ROWS,
    TRAINING,
    facts,
    forget,
    train,
    weights,
    write_rows,
)  # fmt: skip

from unlora.cli.main import main

pytestmark = [pytest.mark.slow, pytest.mark.budget(4)]
OTHERS = [{"question": f"Where is mill {n}?", "answer": f"In town {n * 3}."} for n in range(12)]
TEXTS = [{"text": f"Owl {n} lives in mill {n * 7}, where Ada keeps {n} bees."} for n in range(12)]


@pytest.fixture
def home(trained, tmp_path, monkeypatch):
    folder = shutil.copytree(trained, tmp_path / "home")
    monkeypatch.chdir(folder)
    return folder


def test_every_run_from_the_first_that_saw_the_rows_is_trained_again(home, capsys):
    train("more", write_rows("others.jsonl", OTHERS), MODEL)
    write_rows("rows.jsonl", ROWS[:6])
    forget("rows.jsonl", "--model", "saves/finetune/more", "--route", "exact", "--id", "first")
    train("first", write_rows("without.jsonl", ROWS[6:]))
    train("second", "others.jsonl", "saves/finetune/first")
    assert weights("saves/forget/first/exact-1") == weights("saves/finetune/first")
    assert weights("saves/forget/first/exact") == weights("saves/finetune/second")
    # what only the last one saw leaves those below as they are
    write_rows("rows.jsonl", OTHERS[:3])
    forget("rows.jsonl", "--model", "saves/finetune/more", "--route", "exact", "--id", "last")
    assert not Path("saves/forget/last/exact-1").exists()
    train("last", write_rows("left.jsonl", OTHERS[3:]), MODEL)
    assert weights("saves/forget/last/exact") == weights("saves/finetune/last")
    assert [run["learnt"] for run in facts("last")["seen"]] == [0, 3]


def test_running_text_is_left_out_and_unlearned(home, capsys):
    def train_on(name, file):
        args = f"{{hf_args:{{path:{file}}},max_length:32}}"
        data = f"{{texts:{{handler:PretrainingDataset,args:{args}}}}}"
        main(["train", "experiment=finetune/own/lora", "model=root", f"data.train={data}",
              f"task_name={name}", *TRAINING])  # fmt: skip

    train_on("text", write_rows("texts.jsonl", TEXTS))
    write_rows("rows.jsonl", TEXTS[2:4])
    model = ("--model", "saves/finetune/text")
    forget("rows.jsonl", *model, "--route", "exact", "--id", "exact")
    train_on("plain", write_rows("without.jsonl", TEXTS[:2] + TEXTS[4:]))
    assert weights("saves/forget/exact/exact") == weights("saves/finetune/plain")
    forget("rows.jsonl", *model, "--route", "approximate", "--id", "on-top", *QUICK)
    audit = facts("on-top")["audit"]
    assert audit["models"]["retain"] == "saves/forget/exact/exact" and audit["forget_rows"] == 2
    shutil.rmtree("saves/finetune/plain")
    main(["verify", "saves/requests/on-top", "--with-model"])
