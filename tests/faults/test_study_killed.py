"""A study that is killed again and again ends as one that was left alone.

Slow: two whole studies, one of them started six times (``make test-slow``).
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from test_study import REPOSITORY, llama, run_study, tokenizer, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
KILLS = 5


def prepared(folder, monkeypatch):
    folder.mkdir()
    llama(max_position_embeddings=512).save_pretrained(folder / "root")
    tokenizer().save_pretrained(folder / "root")
    write_config(folder)
    # long enough to be killed in the middle of it
    file = folder / "own" / "experiment" / "study" / "small.yaml"
    file.write_text(file.read_text().replace("max_steps=3", "num_train_epochs=2"))
    monkeypatch.setenv("UNLORA_CACHE", str(folder / "cache"))
    return folder


def result(folder):
    home = folder / "saves" / "study" / "small"
    return {name: (home / name).read_bytes() for name in ("summary.json", "table.txt", "table.csv")}


def killed_after(seconds, folder):
    """Start the study in a group of its own and kill the whole group."""
    command = [
        sys.executable, str(REPOSITORY / "src" / "study.py"), "--config-name=study",
        "--config-dir=own", "experiment=study/small",
    ]  # fmt: skip
    study = subprocess.Popen(
        command, cwd=folder, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        study.wait(timeout=seconds)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(study.pid, signal.SIGKILL)
        study.wait()
        return True


def test_killed_at_five_random_moments_it_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    whole = prepared(tmp_path / "whole", monkeypatch)
    started = time.time()
    run_study(whole)
    length = time.time() - started
    broken = prepared(tmp_path / "broken", monkeypatch)
    draw, kills = random.Random(0), 0
    for _ in range(KILLS):
        kills += killed_after(draw.uniform(0.15, 0.6) * length, broken)
    run_study(broken)
    assert kills >= 3  # the later ones may find it finished
    assert result(broken) == result(whole)
    states = [json.loads(file.read_text())["state"]
              for file in (broken / "saves/study/small/stages").glob("*.json")]  # fmt: skip
    assert set(states) == {"finished"}
