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

import psutil
import pytest
from studies.test_run_study import REPOSITORY, llama, run_study, tokenizer, write_config

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


def num_files(folder):
    return sum(len(files) for _, _, files in os.walk(folder / "saves"))


def started(folder, *words):
    """The study, in a group of its own."""
    command = [
        sys.executable, str(REPOSITORY / "src" / "study.py"), "--config-name=study",
        "--config-dir=own", "experiment=study/small", *words,
    ]  # fmt: skip
    return subprocess.Popen(
        command, cwd=folder, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def killed_at(count, pause, folder):
    """Start the study in a group of its own; kill all of it a while after it has so many files.

    Files, and not seconds: other work on the machine must not decide where it is killed.
    """
    count = max(count, num_files(folder) + 1)
    study = started(folder)
    while study.poll() is None:
        if num_files(folder) >= count:
            time.sleep(pause)
            os.killpg(study.pid, signal.SIGKILL)
            return study.wait() == -signal.SIGKILL
        time.sleep(0.05)
    return False


def test_killed_at_five_random_moments_it_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    whole = prepared(tmp_path / "whole", monkeypatch)
    run_study(whole)
    broken = prepared(tmp_path / "broken", monkeypatch)
    draw, kills = random.Random(0), 0
    for share in sorted(draw.uniform(0.1, 0.8) for _ in range(KILLS)):
        kills += killed_at(share * num_files(whole), draw.uniform(0, 1), broken)
    run_study(broken)
    assert kills >= KILLS - 1  # the last may find it finished
    assert result(broken) == result(whole)
    states = [json.loads(file.read_text())["state"]
              for file in (broken / "saves/study/small/stages").glob("*.json")]  # fmt: skip
    assert set(states) == {"finished"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_of_a_study_that_is_killed_end_as_well(tmp_path, monkeypatch, number):
    folder = prepared(tmp_path / "study", monkeypatch)
    study = started(folder, "workers=2")
    stages, workers = folder / "saves" / "study" / "small" / "stages", []
    while len(workers) < 2 or not list(stages.glob("*-train.log.txt")):
        assert study.poll() is None
        workers = [child for child in psutil.Process(study.pid).children(recursive=True)
                   if "popen_loky" in " ".join(child.cmdline())]  # fmt: skip
        time.sleep(0.1)
    time.sleep(2)  # both are at work
    study.send_signal(number)
    study.wait(60)
    _, left = psutil.wait_procs(workers, timeout=60)
    assert left == []
    run_study(folder, "workers=2")
    assert (folder / "saves/study/small/summary.json").is_file()
