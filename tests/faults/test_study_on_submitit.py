"""A study whose stages are jobs of submitit, here processes of this machine in place of Slurm's."""

import importlib.util
import json

import pytest
from test_study import llama, run_study, tokenizer, write_config

LAUNCHER = ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=20")
SMALLER = ("gold=null", "methods={NPO: [trainer=NPO]}")


@pytest.mark.timeout(900)
def test_a_study_runs_as_jobs(tmp_path, monkeypatch):
    if importlib.util.find_spec("submitit") is None:
        pytest.skip("submitit is not installed: pip install hydra-submitit-launcher==1.2.0")
    llama(max_position_embeddings=512).save_pretrained(tmp_path / "root")
    tokenizer().save_pretrained(tmp_path / "root")
    write_config(tmp_path)
    monkeypatch.setenv("UNLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "4 stages were run" in run_study(tmp_path, *LAUNCHER, *SMALLER).stdout
    home = tmp_path / "saves" / "study" / "small"
    assert len(list(home.glob(".submitit/*/*_result.pkl"))) == 4
    summary = json.loads((home / "summary.json").read_text())
    # joblib finds nothing left to do, and says the same
    assert "0 stages were run, 4 were finished before" in run_study(tmp_path, *SMALLER).stdout
    assert json.loads((home / "summary.json").read_text()) == summary
