"""Several real processes in one folder: runs with one name, evaluations with one cache, readers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from faults_runs import (
    COMMON,
    RUN,
    ZYGOTE,
    check_whole,
    command,
    differences,
    environment,
    prepared,
    result,
    said,
    without_other_metrics,
)
from safetensors import SafetensorError
from safetensors.torch import load_file

LOCKED = "Another process is at work in './saves/unlearn/mine'. Wait for it, or give this one"


def until(true, seconds=60):
    end = time.time() + seconds
    while not true():
        assert time.time() < end, "it did not happen"
        time.sleep(0.005)


def test_of_two_runs_with_one_name_the_second_is_refused(zygote, uninterrupted, tmp_path):
    whole, _ = uninterrupted("NPO")
    folder = prepared(tmp_path / "both")
    first = zygote.start(folder, command("NPO"))
    until(lambda: (folder / RUN / "run_config.json").is_file())
    os.kill(first, signal.SIGSTOP)  # it is slow
    before = len(said(folder))
    assert zygote.run(folder, command("RMU")) == 2
    os.kill(first, signal.SIGCONT)
    assert LOCKED in said(folder)[before:] and "Traceback" not in said(folder)
    assert zygote.wait(first) == 0
    assert differences(whole, result(folder)) == [], "the first one has noticed nothing"
    assert not (folder / f"{RUN}.previous-1").exists()


def test_two_runs_that_start_in_the_same_moment(zygote, uninterrupted, tmp_path):
    whole, _ = uninterrupted("NPO")
    for number in range(3):
        folder = prepared(tmp_path / str(number))
        both = [zygote.start(folder, command("NPO")) for _ in range(2)]
        codes = sorted(map(zygote.wait, both))
        # the second may have come when the first was done; then it has gone on from its end
        assert codes in ([0, 2], [0, 0]), said(folder)[-2000:]
        assert differences(whole, result(folder)) == []


def test_the_lock_goes_with_the_process(zygote, tmp_path):
    folder = prepared(tmp_path / "killed")
    first = zygote.start(folder, command("NPO"))
    until(lambda: (folder / RUN / "checkpoint-2" / "trainer_state.json").is_file())
    os.kill(first, signal.SIGKILL)
    assert zygote.wait(first) == -9
    assert zygote.run(folder, command("NPO")) == 0, said(folder)[-2000:]


def test_it_is_one_sentence_on_the_command_line(zygote, tmp_path):
    """The same as above, with processes that a shell would start."""
    folder = prepared(tmp_path / "both")
    entry = str(ZYGOTE.parents[2] / "src" / "train.py")
    words = [sys.executable, entry, "--config-name=unlearn", *command("NPO")[1:]]
    settings = {"cwd": folder, "env": environment(folder), "text": True}
    first = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **settings
    )
    until(lambda: (folder / RUN / "run_config.json").is_file())
    os.kill(first.pid, signal.SIGSTOP)  # it is slow
    try:
        second = subprocess.run(words, capture_output=True, timeout=120, **settings)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert second.returncode == 2
    last = second.stderr.strip().splitlines()[-1]
    assert last.startswith(LOCKED) and "Traceback" not in second.stderr
    assert first.wait(timeout=120) == 0


def evaluation(name):
    taken = ("eval.", "forget_split", "holdout_split", "model.model_args.torch", "model.tok")
    return [
        "eval", "experiment=eval/pocket/default", "model=any", f"task_name={name}",
        f"model.model_args.pretrained_model_name_or_path={RUN}",
        *(word for word in COMMON if word.startswith(taken)), *without_other_metrics(),
    ]  # fmt: skip


def test_two_evaluations_share_a_cache(zygote, tmp_path):
    folder = prepared(tmp_path / "shared")
    assert zygote.run(folder, command("RMU", "eval.tofu.cache=false")) == 0, said(folder)[-2000:]
    both = [zygote.start(folder, evaluation(name)) for name in ("one", "two")]
    assert [zygote.wait(pid) for pid in both] == [0, 0], said(folder)[-3000:]
    logs = [folder / "saves" / "eval" / n / "TOFU_EVAL.json" for n in ("one", "two")]
    assert logs[0].read_bytes() == logs[1].read_bytes()
    check_whole(folder)
    assert not list((folder / "cache").rglob("*.tmp"))
    # what they have kept is whole: a third asks the model nothing
    saved = folder / "moments.json"
    assert zygote.run(folder, evaluation("three"), {"save": str(saved)}) == 0
    assert not [kind for kind, _ in json.loads(saved.read_text()) if kind == "forward"]
    third = folder / "saves" / "eval" / "three" / "TOFU_EVAL.json"
    assert third.read_bytes() == logs[0].read_bytes()
    # and an answer that is damaged is asked again
    for answers in (folder / "cache" / "answers").rglob("*.answers"):
        answers.write_bytes(answers.read_bytes()[:-9])
    assert zygote.run(folder, evaluation("four"), {"save": str(saved)}) == 0
    assert [kind for kind, _ in json.loads(saved.read_text()) if kind == "forward"]


def test_of_two_evaluations_into_one_folder_the_second_is_refused(zygote, tmp_path):
    folder = prepared(tmp_path / "one")
    assert zygote.run(folder, command("RMU", "eval.tofu.cache=false")) == 0, said(folder)[-2000:]
    first = zygote.start(folder, evaluation("same"))
    until(lambda: (folder / "saves" / "eval" / ".same.eval.lock").is_file())
    time.sleep(0.05)  # made, and then locked
    os.kill(first, signal.SIGSTOP)
    assert zygote.run(folder, evaluation("same")) == 2
    os.kill(first, signal.SIGCONT)
    assert "Another process is at work in './saves/eval/same'" in said(folder)
    assert zygote.wait(first) == 0


def test_a_reader_during_a_run_sees_whole_files(zygote, tmp_path):
    folder = prepared(tmp_path / "read")
    assert zygote.run(folder, command("NPO")) == 0, said(folder)[-2000:]
    # again, and onto the files that are there: it goes on from its first checkpoint
    for gone in (4, 6, 8):
        (folder / RUN / f"checkpoint-{gone}" / "trainer_state.json").unlink()
    pid, reads = zygote.start(folder, command("NPO")), 0
    while True:
        alive = _running(pid)
        files = [Path(at, name) for at, _, names in os.walk(folder / RUN) for name in names]
        for file in files:
            if any(part.endswith(".tmp") for part in file.parts):
                continue
            try:
                if file.suffix == ".json":
                    json.loads(file.read_text("utf-8"))
                elif file.suffix == ".safetensors":
                    load_file(file)
                else:
                    continue
            except FileNotFoundError:
                continue  # between listing and opening
            except SafetensorError as error:
                assert "No such file" in str(error)
                continue
            reads += 1
        if not alive:
            break
    assert zygote.wait(pid) == 0, said(folder)[-2000:]
    assert reads > 50


def _running(pid):
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
