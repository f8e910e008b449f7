"""A disk that is really full: a small one, made for the test."""

import os
import shutil
import subprocess
import sys

import pytest
from deletion_runs import MODEL, ROWS, lasting_evidence, make_model, weights, write_rows
from faults_runs import check_whole, command, differences, prepared, result, said


@pytest.fixture
def small_disk(tmp_path):
    """A function: folder, megabytes -> a disk of that size is mounted there."""
    mounted = []

    def mount(folder, kilobytes):
        folder.mkdir()
        made = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(made, capture_output=True).returncode:
            pytest.skip("a disk can be mounted by root only, and not in every container")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("kilobytes", [60, 200, 300, 420])
def test_a_full_disk_is_said_and_costs_nothing(
    zygote, uninterrupted, tmp_path, small_disk, kilobytes
):
    """It is full at the first checkpoint, between checkpoints, or at the end."""
    whole, _ = uninterrupted("PDU")
    folder = prepared(tmp_path / "full")
    small_disk(folder / "saves", kilobytes)
    assert zygote.run(folder, command("PDU")) == 2, said(folder)[-3000:]
    words = said(folder).strip().splitlines()[-1]
    assert words.startswith("The disk is full: ") and "resume_from_checkpoint=auto" in words
    assert "Traceback" not in said(folder)
    check_whole(folder)
    larger = ["mount", "-o", "remount,size=100m", str(folder / "saves")]
    subprocess.run(larger, check=True)
    assert zygote.run(folder, command("PDU")) == 0, said(folder)[-3000:]
    check_whole(folder)
    assert differences(whole, result(folder)) == []


def unlora(folder, *words):
    command = [sys.executable, "-m", "unlora", *words]
    env = {**os.environ, "UNLORA_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("full, kilobytes", [("forget", 220), ("requests", 12)])
def test_a_request_on_a_full_disk_is_one_sentence_and_goes_on(
    tmp_path, small_disk, full, kilobytes
):
    """It is full in the training, or where the evidence is written."""
    (tmp_path / "whole").mkdir()
    whole = make_model(tmp_path / "whole")
    write_rows(whole / "rows.jsonl", ROWS[:6])
    broken = shutil.copytree(whole, tmp_path / "broken")
    small_disk(broken / "saves" / full, kilobytes)
    request = ("forget", "rows.jsonl", "--model", MODEL, "--route", "approximate", "--dial", "none",
               "audit=none", "trainer.args.num_train_epochs=2")  # fmt: skip
    stopped, before = unlora(broken, *request), weights(broken / MODEL)
    said = [x for x in stopped.stderr.splitlines() if x.startswith("The disk is full: ")]
    assert stopped.returncode == 2 and "Traceback" not in stopped.stderr, stopped.stderr
    assert len(said) == 1 and "give the same command again" in said[0]
    assert not list(broken.glob("saves/requests/*/evidence.json"))
    remount = ["mount", "-o", "remount,size=100m", str(broken / "saves" / full)]
    subprocess.run(remount, check=True)
    assert unlora(broken, *request).returncode == 0
    assert unlora(whole, *request).returncode == 0
    (folder, left), (_, expected) = lasting_evidence(broken), lasting_evidence(whole)
    assert left == expected and weights(broken / MODEL) == before
    assert unlora(broken, "verify", str(folder)).returncode == 0
