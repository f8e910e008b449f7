"""A study through its entry point: stages in processes of their own, and one page in the end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tiny import llama, tokenizer

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.slow  # studies with several processes
SHIPPED = REPOSITORY / "configs" / "metrics" / "tofu.yaml"
METRICS = ("forget_Q_A_Prob", "forget_Q_A_ROUGE", "retain_Q_A_Prob", "exact_memorization")
TRAINING = (
    "trainer.args.max_steps=3", "trainer.args.per_device_train_batch_size=2",
    "trainer.args.learning_rate=1e-2", "model.lora_config.r=4",
)  # fmt: skip


def write_config(folder: Path) -> None:
    """``experiment=study/small`` and a trainer, in a folder ``own``: a tiny model, few metrics."""
    others = OmegaConf.load(SHIPPED).default
    model = [
        "model.model_args.pretrained_model_name_or_path=root",
        "model.tokenizer_args.pretrained_model_name_or_path=root",
    ]
    finetune = ["experiment=finetune/pocket/lora", *model, *TRAINING]
    config = {
        "task_name": "small", "seeds": [0], "workers": 2, "target": finetune,
        "gold": [*finetune, "data.train.POCKET_QA_full.args.hf_args.name=retain99"],
        "unlearn": [
            "experiment=unlearn/pocket/lora", *TRAINING, "forget_split=forget01",
            "holdout_split=holdout01", "eval.tofu.max_new_tokens=2", "eval.tofu.panel=[]", model[1],
            *(f"~eval.tofu.metrics.{name}" for name in others if name not in METRICS),
        ],
        "methods": {"NPO": ["trainer=NPO"], "GradDiff": ["trainer=Own"]},
    }  # fmt: skip
    file = folder / "own" / "experiment" / "study" / "small.yaml"
    file.parent.mkdir(parents=True)
    trainer = folder / "own" / "trainer" / "Own.yaml"
    trainer.parent.mkdir()
    trainer.write_text("defaults: [finetune]\n\nhandler: GradDiff\nmethod_args: {alpha: 1.0}\n")
    file.write_text("# @package _global_\n" + OmegaConf.to_yaml(OmegaConf.create(config)))


def run_study(folder, *overrides, code=0):
    command = [
        sys.executable, str(REPOSITORY / "src" / "study.py"), "--config-name=study",
        "--config-dir=own", "experiment=study/small", *overrides,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    llama(max_position_embeddings=512).save_pretrained(folder / "root")
    tokenizer().save_pretrained(folder / "root")
    write_config(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNLORA_CACHE", str(folder / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        return folder, run_study(folder)


def test_stages_run_side_by_side_in_processes_of_joblib(study):
    folder, done = study
    lines = [line for line in done.stderr.splitlines() if line.endswith(" s")]
    assert len(lines) == 8 and any("train gold (seed 0)" in line for line in lines)
    logs = [json.loads(f.read_text()) for f in (folder / "saves/study/small/stages").glob("*.json")]
    assert {log["state"] for log in logs} == {"finished"}
    first = [log for log in logs if log["stage"]["run"] in ("gold", "target")
             and log["stage"]["kind"] == "train"]  # fmt: skip
    assert max(x["started"] for x in first) < min(x["started"] + x["seconds"] for x in first)


def test_it_ends_with_a_table_and_a_page(study):
    folder, done = study
    home = folder / "saves" / "study" / "small"
    summary = json.loads((home / "summary.json").read_text())
    assert list(summary) == ["target", "gold", "NPO", "GradDiff"]
    assert summary["target"]["forget_Q_A_Prob"] != summary["gold"]["forget_Q_A_Prob"]
    assert "8 stages were run, 0 were finished before" in done.stdout
    assert "GradDiff" in (home / "table.txt").read_text()
    page = (home / "report.html").read_text("utf-8")
    assert "GradDiff" in page and "small" in page
    assert not list(home.glob("seed0/*/checkpoint-*"))
    command = json.loads((home / "seed0/NPO/manifest.json").read_text())["command"]
    assert command.startswith("unlora unlearn experiment=unlearn/pocket/lora")
    assert "trainer=NPO trainer.args.seed=0 paths.output_dir=saves/study/small/seed0/NPO" in command


def test_the_plan_is_shown_without_doing_anything(study):
    folder, _ = study
    before = sorted(folder.rglob("*"))
    done = run_study(folder, "seeds=[0,1]", "--dry-run")
    assert [file for file in sorted(folder.rglob("*")) if file not in before] == []
    lines = done.stdout.splitlines()
    assert any(x.split()[:2] == ["seed0-NPO-train", "finished"] for x in lines)
    row = next(x for x in lines if x.startswith("seed1-target-train")).split()
    assert row[1:3] == ["to", "run"] and "GB" in row and row[4] == "3"  # steps
    assert any(x.startswith("seed1-NPO-eval") and "after seed1-NPO-train" in x for x in lines)
    assert "8 of 16 stages are to be run. About " in done.stdout


def test_a_changed_method_runs_its_stages_alone_and_one_that_fails_says_why(study):
    folder, _ = study
    done = run_study(
        folder,
        "methods.NPO=['trainer=NPO','trainer.method_args.beta=0.5']",
        "+methods.KL=['trainer=GradDiff','trainer.method_args.retain_loss_type=KLL']",
        code=2,
    )
    assert "3 stages were run, 6 were finished before" in done.stdout
    assert "train NPO (seed 0): " in done.stderr and "train GradDiff" not in done.stderr
    assert "train KL (seed 0): " in done.stderr and "Did you mean 'KL'" in done.stderr
    assert "Not run, as they wait for those: evaluate KL (seed 0)." in done.stderr
    assert "Traceback" not in done.stderr
    page = (folder / "saves/study/small/report.html").read_text("utf-8")
    assert "Not on this page" in page and "train KL (seed 0): " in page
