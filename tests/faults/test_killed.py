"""Runs that are stopped at random moments and resumed end as the one that nothing has stopped.

Compared bit for bit: the adapter, the last checkpoint with optimiser, schedule, random states and
what the objective remembers (RMU's direction, the multipliers of PDU and BLADE, GRU's average), the
best checkpoint, the log of the training, and every figure of the evaluation.
"""

import random
import re
import zlib

import pytest
from faults_runs import METHODS, RUN, check_whole, command, differences, prepared, result, said

KILLED = [
    (method, phase, number)
    for method in METHODS
    for phase, times in (("training", 2), ("checkpoint", 2), ("cut", 1), ("evaluation", 1))
    for number in range(times)
]
SEED = 0


def moment(moments, phase, draw):
    """A random moment of a phase: as the fault that happens there."""
    begin = next(i for i, (kind, _) in enumerate(moments) if kind == "forward")
    # an optimiser is tried before weights are loaded; that is no step of the training
    steps = [i for i, (kind, _) in enumerate(moments) if kind == "step" and i > begin]
    last = steps[-1]
    if phase == "cut":  # a file that cannot grow further, at or after some step
        step = draw.randint(2, sum(kind == "step" for kind, _ in moments))
        return {"kind": "step", "number": step, "do": "cut", "size": draw.randint(200, 20_000)}
    fitting = [
        i
        for i, (kind, what) in enumerate(moments)
        if {
            "training": kind == "forward" and i < last,
            "early": kind == "forward" and steps[0] < i < steps[-2],
            "checkpoint": kind == "file" and "/checkpoint-" in what,
            "evaluation": i > last + 1 and "checkpoint-" not in what,
        }[phase]
    ]
    chosen = draw.choice(fitting)
    kind = moments[chosen][0]
    return {"kind": kind, "number": sum(k == kind for k, _ in moments[: chosen + 1])}


def stopped_and_resumed(zygote, folder, method, fault):
    """The exit code of the stopped run; the folder holds what the resumed one has left."""
    code = zygote.run(folder, command(method), fault)
    check_whole(folder)
    assert zygote.run(folder, command(method)) == 0, said(folder)[-3000:]
    check_whole(folder)
    return code


def draws(*key):
    return random.Random(zlib.crc32(repr((SEED, *key)).encode()))


@pytest.mark.parametrize("method, phase, number", KILLED)
def test_killed(zygote, uninterrupted, tmp_path, method, phase, number):
    whole, moments = uninterrupted(method)
    folder = prepared(tmp_path / "killed")
    fault = moment(moments, phase, draws(method, phase, number))
    code = stopped_and_resumed(zygote, folder, method, fault)
    assert code == (-25 if phase == "cut" else -9), f"{fault} has not happened: {said(folder)}"
    assert differences(whole, result(folder)) == [], fault


@pytest.mark.parametrize("method", METHODS)
def test_killed_again_and_again(zygote, uninterrupted, tmp_path, method):
    whole, moments = uninterrupted(method)
    folder, draw = prepared(tmp_path / "killed"), draws(method, "again")
    forwards = sum(kind == "forward" for kind, _ in moments)
    kills = 0
    for _ in range(4):  # a resumed run makes fewer passes, and may have ended before
        fault = {"kind": "forward", "number": draw.randint(forwards // 4, forwards // 2)}
        kills += zygote.run(folder, command(method), fault) == -9
        check_whole(folder)
    assert zygote.run(folder, command(method)) == 0, said(folder)[-3000:]
    assert kills >= 2 and differences(whole, result(folder)) == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("do", ["raise", "full"])
def test_an_exception_or_a_full_disk(zygote, uninterrupted, tmp_path, method, do):
    whole, moments = uninterrupted(method)
    folder = prepared(tmp_path / "failed")
    # after a step: a pass that tries how the model may be asked takes an exception for a no
    fault = moment(moments, "early" if do == "raise" else "checkpoint", draws(method, do))
    code = stopped_and_resumed(zygote, folder, method, fault | {"do": do})
    assert code == (1 if do == "raise" else 2)
    if do == "full":
        assert "The disk is full" in said(folder) and "Traceback" not in said(folder)
    assert differences(whole, result(folder)) == [], fault


@pytest.mark.parametrize("method", METHODS)
def test_preempted_while_training(zygote, uninterrupted, tmp_path, method):
    whole, moments = uninterrupted(method)
    folder = prepared(tmp_path / "preempted")
    fault = moment(moments, "early", draws(method, "term"))
    assert zygote.run(folder, command(method), fault | {"do": "term"}) == 143
    sentence = said(folder).strip().splitlines()[-1]
    written = re.fullmatch(
        r"Stopped by SIGTERM. The checkpoint (\S+) was written; the same command with "
        r"trainer.args.resume_from_checkpoint=auto goes on there.",
        sentence,
    )
    assert written, said(folder)[-2000:]
    assert (folder / written[1] / "trainer_state.json").is_file()
    before = said(folder)
    assert zygote.run(folder, command(method)) == 0, said(folder)[-3000:]
    assert "Traceback" not in before
    assert differences(whole, result(folder)) == [], fault


def test_preempted_with_its_whole_group(zygote, uninterrupted, tmp_path):
    """As Slurm and a terminal do it, where the data were asked for by workers."""
    whole, moments = uninterrupted("RMU")
    folder = prepared(tmp_path / "preempted")
    workers = command("RMU", "trainer.args.dataloader_num_workers=1")
    fault = moment(moments, "early", draws("group")) | {"do": "term all"}
    assert zygote.run(folder, workers, fault) == 143, said(folder)[-2000:]
    assert "Stopped by SIGTERM. The checkpoint" in said(folder)
    assert "Traceback" not in said(folder)
    assert zygote.run(folder, workers) == 0, said(folder)[-2000:]
    assert differences(whole, result(folder)) == [], fault


def test_preempted_without_any_checkpoints_asked_for(zygote, uninterrupted, tmp_path):
    """The one that SIGTERM has it write is enough."""
    whole, moments = uninterrupted("RMU")
    folder = prepared(tmp_path / "preempted")
    none = command("RMU", "trainer.args.save_strategy=no", "trainer.args.save_only_model=true")
    fault = moment(moments, "early", draws("none")) | {"do": "term"}
    assert zygote.run(folder, none, fault) == 143, said(folder)[-2000:]
    assert zygote.run(folder, none) == 0, said(folder)[-2000:]
    adapter = "adapter_model.safetensors"
    assert (folder / RUN / adapter).read_bytes() == whole[adapter]


@pytest.mark.parametrize("where", ["in the last step", "while evaluating"])
def test_preempted_when_the_training_is_over(zygote, uninterrupted, tmp_path, where):
    whole, moments = uninterrupted("NPO")
    folder = prepared(tmp_path / "preempted")
    if where == "in the last step":
        steps = sum(kind == "step" for kind, _ in moments)
        fault = {"kind": "step", "number": steps, "do": "term"}
    else:
        forwards = sum(kind == "forward" for kind, _ in moments)
        fault = {"kind": "forward", "number": forwards - 5, "do": "term"}
    assert zygote.run(folder, command("NPO"), fault) == 143
    assert "its evaluation is not finished: unlora eval model=saves/unlearn/mine" in said(folder)
    adapter = "adapter_model.safetensors"
    assert (folder / RUN / adapter).read_bytes() == whole[adapter], "the training is not lost"
    assert zygote.run(folder, command("NPO")) == 0
    assert differences(whole, result(folder)) == []
