"""A study whose stages are jobs of submitit or Ray, on this machine in place of many."""

import importlib.util
import json

import pytest
from studies.test_run_study import llama, run_study, tokenizer, write_config

SMALLER = ("gold=null", "~methods.GradDiff")
LAUNCHERS = {
    "submitit": ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=20"),
    "ray": ("hydra/launcher=ray",),
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("package", LAUNCHERS)
def test_a_study_runs_as_jobs(tmp_path, monkeypatch, package):
    launcher = {"submitit": "hydra-submitit-launcher", "ray": "hydra-ray-launcher"}[package]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install {launcher}")
    llama(max_position_embeddings=512).save_pretrained(tmp_path / "root")
    tokenizer().save_pretrained(tmp_path / "root")
    write_config(tmp_path)
    monkeypatch.setenv("UNLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = run_study(tmp_path, *LAUNCHERS[package], *SMALLER)
    assert "4 stages were run" in done.stdout
    home = tmp_path / "saves" / "study" / "small"
    if package == "submitit":
        assert len(list(home.glob(".submitit/*/*_result.pkl"))) == 4
    else:
        assert "Started a local Ray instance" in done.stderr
    summary = json.loads((home / "summary.json").read_text())
    # joblib finds nothing left to do, and says the same
    assert "0 stages were run, 4 were finished before" in run_study(tmp_path, *SMALLER).stdout
    assert json.loads((home / "summary.json").read_text()) == summary
