"""A run by two processes logs what a run by one process logs."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
METRICS = ("forget_Q_A_Prob", "forget_Q_A_ROUGE", "retain_Q_A_Prob")
OF_THE_MACHINE = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


def unlearn(folder, name, *overrides, launcher=()):
    """Start ``src/train.py`` on the embedded benchmark; what it says goes to the pipe."""
    fsdp = any("fsdp2" in word for word in launcher)
    script = REPOSITORY / ("tests/helpers/fault_fsdp.py" if fsdp else "src/train.py")
    command = [
        sys.executable, *launcher, str(script), "--config-name=unlearn",
        "experiment=unlearn/pocket/lora", "model=any-lora", "trainer=NPO",
        "model.model_args.pretrained_model_name_or_path=root",
        "model.tokenizer_args.pretrained_model_name_or_path=root",
        "model.model_args.torch_dtype=float32", "model.lora_config.r=4",
        "model.lora_config.lora_dropout=0", "forget_split=forget01", "holdout_split=holdout01",
        "eval.tofu.panel_rows=3", "eval.tofu.max_new_tokens=4",
        f"eval.tofu.panel=[{','.join(METRICS)}]", "trainer.args.disable_tqdm=true",
        "trainer.args.max_steps=4", "trainer.args.learning_rate=1e-3",
        "trainer.args.logging_steps=1", "trainer.args.eval_strategy=steps",
        "trainer.args.eval_steps=2", "trainer.args.eval_on_start=true",
        "trainer.args.save_strategy=steps", "trainer.args.save_steps=2",
        f"paths.output_dir={folder / name}", *overrides,
    ]  # fmt: skip
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = alone | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "UNLORA_CACHE": str(folder / f"cache-{name}"),
    }
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def nearly(expected, found, path=""):
    """The same but for the rounding of sums over two processes."""
    assert type(expected) is type(found), path
    if isinstance(expected, dict):
        assert expected.keys() == found.keys(), path
        for key in expected.keys() - set(OF_THE_MACHINE):
            nearly(expected[key], found[key], f"{path}/{key}")
    elif isinstance(expected, list):
        for i, (one, other) in enumerate(zip(expected, found, strict=True)):
            nearly(one, other, f"{path}/{i}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5), path
    else:
        assert expected == found, path


SIZE = "trainer.args.per_device_train_batch_size"
FILE = ("-m", "accelerate.commands.launch", "--num_processes", "2", "--config_file")
LAUNCHERS = {
    "torchrun": TORCHRUN,
    "zero3": (*FILE, str(REPOSITORY / "configs" / "accelerate" / "zero3.yaml")),
    "fsdp2": (*FILE, str(REPOSITORY / "configs" / "accelerate" / "fsdp2.yaml")),
}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of one process, in a folder with its root."""
    folder = tmp_path_factory.mktemp("processes")
    tiny.llama(max_position_embeddings=512).save_pretrained(folder / "root")
    tiny.tokenizer().save_pretrained(folder / "root")
    finished(unlearn(folder, "one", f"{SIZE}=2"))
    return folder


def finished(process):
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 0, said[-3000:]
    return said


def manifest(folder, name):
    return json.loads((folder / name / "manifest.json").read_text())


@pytest.mark.slow  # each starts three Pythons
@pytest.mark.parametrize("kind", LAUNCHERS)
def test_two_processes_train_and_evaluate_as_one(one, kind):
    if kind == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install deepspeed==0.19.8")
    started = unlearn(one, kind, "global_batch_size=2", launcher=LAUNCHERS[kind])
    said = finished(started)
    alone, both = manifest(one, "one"), manifest(one, kind)
    panels = [entry for entry in alone["training"] if "eval_forget_Q_A_Prob" in entry]
    assert len(panels) == 3 and all(f"eval_{name}" in panels[0] for name in METRICS)
    assert panels[0]["eval_forget_Q_A_Prob"] != pytest.approx(
        panels[2]["eval_forget_Q_A_Prob"], rel=1e-2
    )
    steps = [entry for entry in alone["training"] if "loss" in entry]
    assert len(steps) == 4 and all("forget_loss" in entry for entry in steps)
    assert alone["effective_batch"] == both["effective_batch"] == 2
    assert both["batch_layout"] == {"rows": 1, "accumulation": 1, "processes": 2}
    nearly(alone["training"], both["training"])
    logs = [json.loads((one / n / "evals" / "TOFU_EVAL.json").read_text()) for n in ("one", kind)]
    if kind != "torchrun":  # it needs all weights in one process
        assert both["summary"].get("mia_gradnorm") is None
        for found in (alone["summary"], both["summary"], *logs):
            found.pop("mia_gradnorm", None)
    nearly(alone["summary"], both["summary"])
    nearly(*logs)
    compare(one, kind)
    # the second process leaves the talking to the first
    for line in ("finished: ", "tofu: not computed: forget_quality", "guard: gradients alive"):
        assert said.count(line) == 1, line
    # and both go on from a checkpoint to the same end
    for gone in ("checkpoint-4/trainer_state.json", "adapter_model.safetensors"):
        (one / kind / gone).unlink()
    resume = ("global_batch_size=2", "trainer.args.resume_from_checkpoint=auto")
    finished(unlearn(one, kind, *resume, launcher=LAUNCHERS[kind]))
    again = [entry for entry in manifest(one, kind)["training"] if "train_runtime" not in entry]
    nearly([entry for entry in both["training"] if "train_runtime" not in entry], again)
    compare(one, kind)


def compare(folder, kind):
    weights = [load_file(folder / n / "adapter_model.safetensors") for n in ("one", kind)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_that_are_preempted_go_on_to_the_same_bits(one, tmp_path):
    """One of them is told; both write the checkpoint, and stop."""
    settings = ("global_batch_size=2", "trainer.args.max_steps=40", "trainer.args.eval_steps=100",
                "trainer.args.save_steps=100", "trainer.args.resume_from_checkpoint=auto",
                "model.lora_config.lora_dropout=0.1")  # fmt: skip
    whole = unlearn(one, "whole", *settings, launcher=TORCHRUN)
    finished(whole)
    stopped = unlearn(one, "stopped", *settings, launcher=TORCHRUN)
    log = one / "stopped" / "logs"
    while stopped.poll() is None and not list(log.rglob("events*")):
        time.sleep(0.05)  # the training has begun
    workers = Path(f"/proc/{stopped.pid}/task/{stopped.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGTERM)
    said = stopped.communicate(timeout=300)[0]
    assert stopped.returncode != 0 and "Stopped by SIGTERM. The checkpoint" in said, said[-3000:]
    checkpoints = [int(path.name.partition("-")[2]) for path in (one / "stopped").glob("check*")]
    assert len(checkpoints) == 1 and checkpoints[0] < 40
    finished(unlearn(one, "stopped", *settings, launcher=TORCHRUN))
    adapters = [(one / n / "adapter_model.safetensors").read_bytes() for n in ("whole", "stopped")]
    assert adapters[0] == adapters[1]
