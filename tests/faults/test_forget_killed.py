"""A deletion request that is killed again and again leaves the evidence of one that was left alone.

Files, and not seconds, say where it is killed: other work on the machine must not decide.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from deletion_runs import MODEL, ROWS, lasting_evidence, make_model, write_rows

pytestmark = pytest.mark.timeout(1800)
KILLS = 10
COMMAND = [
    sys.executable, "-m", "unlora", "forget", "rows.jsonl", "--model", MODEL, "--route",
    "approximate", "--dial", "plain", "audit=none", "+audit.off={handler: scale, scale: 0.5}",
    "+audit.int8={handler: quantise, form: int8}", "trainer.args.num_train_epochs=20",
]  # fmt: skip


def start(folder):
    return subprocess.Popen(
        COMMAND, cwd=folder, start_new_session=True,
        env={**os.environ, "UNLORA_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def num_files(folder):
    return sum(len(files) for _, _, files in os.walk(folder / "saves" / "forget"))


def killed_at(count, pause, folder):
    """Start it, and kill it a while after it has so many files."""
    count, request = max(count, num_files(folder) + 1), start(folder)
    while request.poll() is None:
        if num_files(folder) >= count:
            time.sleep(pause)
            os.killpg(request.pid, signal.SIGKILL)
            return request.wait() == -signal.SIGKILL
        time.sleep(0.05)
    return False


def test_killed_at_ten_moments_it_ends_with_the_same_evidence(tmp_path):
    (tmp_path / "whole").mkdir()
    whole = make_model(tmp_path / "whole")
    write_rows(whole / "rows.jsonl", ROWS[:6])
    broken = shutil.copytree(whole, tmp_path / "broken")  # with the key of the row hashes
    assert start(whole).wait() == 0
    draw, kills = random.Random(0), 0
    for share in sorted(draw.uniform(0.05, 0.95) for _ in range(KILLS)):
        kills += killed_at(share * num_files(whole), draw.uniform(0, 1), broken)
    ended = list(Path(broken, "saves/requests").glob("*/evidence.json"))
    assert ended or start(broken).wait() == 0
    assert kills >= KILLS // 2  # the last ones may have nothing left to be killed in
    (folder, left), (_, expected) = lasting_evidence(broken), lasting_evidence(whole)
    assert left == expected
    command = [sys.executable, "-m", "unlora", "verify", str(folder)]
    assert subprocess.run(command, check=False).returncode == 0
