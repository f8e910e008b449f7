"""Studies whose stages are pretended, so that what is run and what is not can be counted."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import llama, tokenizer

from unlora.studies import stage_fingerprints, stage_run
from unlora.studies.config import read

METHODS = {"NPO": ["trainer=NPO"], "GradDiff": ["trainer=GradDiff"]}
OBJECTIVE = {"forget": ["forget_Q_A_Prob"], "utility": "model_utility", "keep": 0.9}


def study(**changes):
    """A config of a study on pocket's rows and a tiny model in ``root``."""
    root = "model.model_args.pretrained_model_name_or_path=root"
    tokens = "model.tokenizer_args.pretrained_model_name_or_path=root"
    finetune = ["experiment=finetune/pocket/lora", root, tokens]
    return {
        "mode": "study", "task_name": "mine", "workers": 1, "seeds": [0, 1],
        "paths": {"output_dir": "home", "root_dir": "."},
        "target": finetune,
        "gold": [*finetune, "data.train.POCKET_QA_full.args.hf_args.name=retain90"],
        "unlearn": ["experiment=unlearn/pocket/lora", tokens],
        "methods": METHODS,
        "search": {"trials": 0, "seed": 7, "objective": OBJECTIVE, "space": {}},
        **changes,
    }  # fmt: skip


@pytest.fixture
def checked():
    return lambda **changes: read(study(**changes))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the tiny model ``root``, where work is done."""
    monkeypatch.chdir(tmp_path)
    llama(max_position_embeddings=512).save_pretrained("root")
    tokenizer().save_pretrained("root")
    return Path("home")


@pytest.fixture
def pretended(monkeypatch):
    """Training and evaluation that only write files; the names of the stages that were run."""
    ran = []

    def run(stage, key):
        ran.append(stage.name)
        config = stage_fingerprints.config_of(stage)
        place = Path(stage.evals if stage.kind == "eval" else stage.folder)
        place.mkdir(parents=True, exist_ok=True)
        if stage.kind == "train":
            (place / "config.json").write_text("{}")
            start = stage_fingerprints.model_content(
                config["model"]["model_args"]["pretrained_model_name_or_path"]
            )
            told = json.dumps([start, config["trainer"], config["data"]], sort_keys=True)
            save_file({"told": torch.tensor([*told.encode()])}, place / "model.safetensors")
            (place / "run_config.json").write_text(json.dumps(config))
            return
        figures = figures_of(stage, config)
        log = {name: {"agg_value": value} for name, value in figures.items()}
        (place / "TOFU_EVAL.json").write_text(json.dumps(log))
        (place / "TOFU_SUMMARY.json").write_text(json.dumps(figures))

    monkeypatch.setattr(stage_run, "_run", run)
    return ran


def figures_of(stage, config):
    """Gold has .2, the target .9; a method is the closer to gold the nearer its rate is to .01."""
    if stage.role != "method":
        return {"forget_Q_A_Prob": 0.2 if stage.role == "gold" else 0.9, "model_utility": 0.8}
    run = json.loads((Path(stage.folder) / "run_config.json").read_text())
    rate = run["trainer"]["args"]["learning_rate"]
    return {"forget_Q_A_Prob": 0.2 + min(0.7, abs(rate - 0.01) * 10), "model_utility": 0.75}


def here(stages):
    """A launcher that does everything in this process."""
    return [stage_run.do(stage, record) for stage, record in stages]
