"""A disk that is really full: a small one, made for the test."""

import os
import subprocess

import pytest
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
