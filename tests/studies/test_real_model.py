"""The study of a real model: what it trains and asks, before anything is loaded."""

from pathlib import Path

import pytest
import torch

from unlora.cli.compose import composed
from unlora.errors import InputError
from unlora.studies import launchers, stage_fingerprints
from unlora.studies.config import read
from unlora.studies.stages import plan

METHODS = "NPO SimNPO GradDiff GradAscent UNDIAL WGA RMU PDU IdkNLL".split()
SEVEN = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


def study_of(*words):
    return read(composed("study", ["experiment=study/tofu/smollm2", "seeds=[0]", *words]))


@pytest.mark.budget(4)  # two whole configs are composed
def test_target_learns_all_rows_and_all_models_are_asked_for_few(tmp_path):
    data = tmp_path / "data's"
    data.mkdir()
    study = study_of(f'paths.datasets_dir="{data}"')
    assert [*study.methods] == METHODS
    assert study.dial == "plain"
    stages = {stage.name: stage for stage in plan(study, Path("saves/study/smollm2"))}
    target = stage_fingerprints.config_of(stages["seed0-target-train"])
    parts = target["data"]["train"].items()
    retain = {"path": "locuslab/TOFU", "name": "retain99", "split": "train[:100]"}
    forget = {"path": "locuslab/TOFU", "name": "forget01", "split": "train"}
    assert {name: each["args"]["hf_args"] for name, each in parts} == {
        "TOFU_QA_retain": retain,
        "TOFU_QA_forget": forget,
    }
    assert [word for word in study.target if "FORGET" not in word.upper()] == [
        word for word in study.gold if not word.startswith("data/")
    ]  # gold has the same settings
    assert target["paths"]["datasets_dir"] == str(data)
    assert target["model"]["lora_config"]["target_modules"] == SEVEN
    assert target["model"]["model_args"]["torch_dtype"] == "float32"
    suite = stage_fingerprints.config_of(stages["seed0-NPO-eval"])["eval"]["tofu"]
    assert suite["data"]["world_facts"]["hf_args"]["split"] == "train[:20]"
    assert suite["data"]["forget"]["hf_args"]["name"] == "forget01_perturbed"
    assert {"model_utility", "forget_Q_A_ROUGE", "collapsed"} <= set(suite["metrics"])


def test_a_stage_takes_no_more_threads_than_it_is_given(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    before = torch.get_num_threads()  # what OMP_NUM_THREADS says
    launchers._limit_threads(1)
    assert torch.get_num_threads() == before < 8


def test_a_study_says_at_once_that_its_folder_of_data_is_not_there():
    with pytest.raises(InputError, match="nowhere"):
        study_of("paths.datasets_dir=nowhere")


@pytest.mark.parametrize("name", ["smollm2_full", "qwen2.5-1.5b", "qwen2.5-3b", "llama-3.2-1b"])
@pytest.mark.default_cases(2)
@pytest.mark.budget(2)
def test_the_larger_studies_are_the_same_but_for_model_and_rows(name):
    small, study = study_of(), read(composed("study", [f"experiment=study/tofu/{name}"]))
    assert study.task_name == name
    assert study.methods == small.methods and study.audit == small.audit
    words = {
        "data.retain.TOFU_QA_retain.args.hf_args.split='train[:200]'",
        "eval.tofu.data.holdout.hf_args.split='train[:40]'",
        "eval.tofu.data.retain.hf_args.split='train[:50]'",
        "eval.tofu.data.real_authors.hf_args.split='train[:50]'",
        "eval.tofu.data.world_facts.hf_args.split='train[:50]'",
    }
    if name != "smollm2_full":
        words |= {f"model={study.model['path']}", "model.model_args.torch_dtype=bfloat16"}
    assert set(study.unlearn) - set(small.unlearn) == words
    assert len(study.target) == len(small.target)


def test_a_number_of_rows_that_no_list_uses_is_refused():
    with pytest.raises(InputError, match="rows.retain is set, but no list of this study uses it"):
        read(composed("study", ["experiment=study/pocket/lora", "+rows.retain=3"]))
    with pytest.raises(InputError, match="rows.retain"):
        study_of("rows.retain=0")
