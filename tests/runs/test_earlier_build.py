"""A run folder of build 1920345 is a model, a log and a history to the code of today.

``earlier_build`` was written by that build on its own: ``unlora train`` on eight rows, then
``unlora unlearn`` (NPO) on four of them, evaluated. Only absolute paths were cut from it, and of
one checkpoint what is no pickle is left.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from unlora import read_run
from unlora.cli.main import main
from unlora.data.chat_encoding import Chat
from unlora.data.collate import collate
from unlora.model import get_model, resolve_model
from unlora.model.lineage import Lineage

RUN = "saves/unlearn/forgot"
FIGURE = 0.0016132504987661986  # forget_Q_A_Prob, as that build printed it


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The folder, where a command may write."""
    shutil.copytree(Path(__file__).parent / "earlier_build", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_records_log_and_lineage_are_read(home):
    run = read_run(RUN)
    assert run.entry("OWN", "forget_Q_A_Prob").value == FIGURE
    assert run.manifest["guards"] and run.config["trainer"]["handler"] == "NPO"
    lineage = Lineage.read(RUN)
    assert [link.path.name for link in lineage.links] == ["full", "forgot"]
    assert Path(lineage.root).resolve() == (home / "root").resolve()


def test_its_model_says_what_it_said(home):
    args = {"pretrained_model_name_or_path": RUN}
    resolved = resolve_model({"model_args": args, "as_trained": True})
    model, tokenizer = get_model(resolved, trainable=False)
    chat = Chat(tokenizer, resolved.section.template_args)
    rows = [json.loads(line) for line in Path("forget.jsonl").read_text().splitlines()]
    probabilities = []
    for row in chat.encode_all([(row["question"], row["answer"]) for row in rows]):
        with torch.no_grad():
            probabilities.append(float(torch.exp(-model(**collate([row], 0)).loss)))
    assert sum(probabilities) / len(probabilities) == pytest.approx(FIGURE, rel=1e-5)


def test_its_rows_are_found(home, capsys):
    main(["who-saw", "forget.jsonl", RUN])
    assert "4 of 4 rows were seen; runs: 1." in capsys.readouterr().out


@pytest.mark.slow
def test_it_is_reported_evaluated_and_exported_and_its_checkpoint_is_refused(home, capsys):
    main(["report", RUN])
    assert "forgot" in capsys.readouterr().out
    data = ["data.forget=forget.jsonl", "data.retain=retain.jsonl"]
    words = ["experiment=eval/own/default", f"model={RUN}", *data, "eval.own.max_new_tokens=4"]
    main(["eval", *words, "task_name=again", "paths.output_dir=again", "--quiet"])
    summary = json.loads(Path("again/OWN_SUMMARY.json").read_text())
    assert summary["forget_Q_A_Prob"] == pytest.approx(FIGURE, rel=1e-5)
    main(["export", RUN, "--merged"])
    assert Path(RUN, "exported/merged/model.safetensors").is_file()
    with pytest.raises(SystemExit) as left:
        main([
            "unlearn", "experiment=unlearn/own/lora", "model=saves/finetune/full", *data,
            "task_name=forgot", "trainer=NPO", "trainer.args.resume_from_checkpoint=auto",
            "model.lora_config.r=2",
        ])  # fmt: skip
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "checkpoint-4 is not used: it has no checkpoint.json" in said
    assert "An earlier version of this program may have written it" in said
