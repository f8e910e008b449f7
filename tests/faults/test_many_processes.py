"""Two processes see the rows of one, in its order, and end with its adapter.

They are started with the files of ``configs/accelerate``. Forget data have 9 or 11 rows and a step
8, so the last step of an epoch has fewer rows, and in some of them a process has none.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from fault_training import LEFT_OUT, SEEN, train
from faults_runs import environment
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parents[2]
ADAPTER = "adapter_model.safetensors"
PLAIN = ("NPO", "GradDiff", "RMU", "DPO")
COMPOSED = ("PDU", "BLADE", "GRU+SAM", "BalDRO")  # DeepSpeed and FSDP have no gradients for them


def layouts(methods, **settings):
    return {f"{method}, {rows} rows": {"method": method, "rows": rows, **settings}
            for method in methods for rows in (9, 11)}  # fmt: skip


# AdamW divides a rounding error by a gradient that may be as small. So float32 is compared at the
# learning rate of the experiments and without methods that take several gradients apart; in
# float64, at ten times that, nothing but a mistake could make a difference
FLOAT32 = {
    **layouts(PLAIN, learning_rate=1e-4),
    "gradient checkpointing": {"gradient_checkpointing": True, "learning_rate": 1e-4},
}
FLOAT64 = {
    f"{name}, float64": case for name, case in layouts(PLAIN + COMPOSED, double=True).items()
}
DDP = {**FLOAT32, **FLOAT64, "no last batch": {"dataloader_drop_last": True, "double": True}}


def by_two(folder, cases, *launches, seconds=500):
    """Train all cases with two processes, of 2 rows each, in two micro-batches.

    Args:
        launches: for each machine, its arguments of ``accelerate launch``.
    """
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    content = json.dumps({name: settings | case for name, case in cases.items()})
    script = str(REPOSITORY / "tests" / "helpers" / "fault_training.py")
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", *arguments, script, str(folder),
             content],
            text=True, cwd=REPOSITORY, env=environment(folder) | {"DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for arguments in launches
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=seconds)[0] for process in started]
    except subprocess.TimeoutExpired:
        for process in started:
            process.terminate()  # with what it has launched
        raise
    assert [process.returncode for process in started] == [0] * len(started), said[0][-2000:]


def with_file(name, *more):
    return ["--config_file", f"configs/accelerate/{name}.yaml", "--num_processes", "2", *more]


def check(case, alone, folder):
    """The same rows in every step, in the same order, and the same adapter."""
    train(alone, **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **case})
    steps = json.loads((alone / SEEN.format(0)).read_text())
    shares = [json.loads((folder / SEEN.format(rank)).read_text()) for rank in (0, 1)]
    assert len(steps) == 5
    for step, *both in zip(steps, *shares, strict=True):
        for part, rows in step.items():
            joined, left = [], [share[part] for share in both]
            while any(left):  # two rows of each process after one another, as far as there are any
                joined += [row for rows in left for row in rows[:2]]
                left = [rows[2:] for rows in left]
            assert joined == rows
    dropped = case.get("dataloader_drop_last")
    assert len(steps[1]["forget"]) == (8 if dropped else case.get("rows", 11) - 8)
    weights, expected = load_file(folder / ADAPTER), load_file(alone / ADAPTER)
    assert weights.keys() == expected.keys()
    moved = max(float(x.abs().max()) for name, x in expected.items() if "lora_B" in name)
    difference = max(float((weights[name] - expected[name]).abs().max()) for name in expected)
    print(f"greatest difference: {difference:.1e}, of adapters that moved by {moved:.1e}")
    assert difference <= (1e-8 if case.get("double") else 1e-6) < moved / 100


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    by_two(folder, DDP, with_file("ddp"))
    return folder


@pytest.mark.parametrize("name", DDP)
def test_ddp_is_one_process(ddp, tmp_path, name):
    check(DDP[name], tmp_path, ddp / name)


SPLIT = {
    "zero2": ("zero3", "--zero_stage", "2"),
    "zero3": ("zero3",),
    "fsdp2": ("fsdp2",),
}  # fmt: skip


@pytest.fixture(scope="module", params=SPLIT)
def split(request, tmp_path_factory):
    if "zero" in request.param and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install deepspeed==0.19.8")
    folder = tmp_path_factory.mktemp(request.param)
    by_two(folder, FLOAT32, with_file(*SPLIT[request.param]))
    return folder


@pytest.mark.parametrize("name", FLOAT32)
def test_split_weights_are_one_process(split, tmp_path, name):
    check(FLOAT32[name], tmp_path, split / name)


def test_two_nodes_are_one_process(tmp_path):
    """Two launches on this machine, as on two, that meet at a port."""
    case = FLOAT32["NPO, 11 rows"]
    ranks = [with_file("two_nodes", "--machine_rank", rank) for rank in "01"]
    by_two(tmp_path / "two", {"NPO": case}, *ranks)
    check(case, tmp_path / "one", tmp_path / "two" / "NPO")


@pytest.mark.parametrize("method", ["NPO", "PDU"])
def test_a_loss_that_one_process_sees_is_left_out_by_both(tmp_path, method):
    case = {"method": method, "infinite": 2}
    by_two(tmp_path, {"skip": case}, with_file("ddp"), seconds=120)
    for rank in (0, 1):
        assert json.loads((tmp_path / "skip" / LEFT_OUT.format(rank)).read_text()) == [2]
    weights = load_file(tmp_path / "skip" / ADAPTER)
    assert all(weight.isfinite().all() for weight in weights.values())
