"""A run by two processes logs what a run by one process logs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

SRC = Path(__file__).parents[2] / "src"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
NAMES = ("one", "two")
METRICS = ("forget_Q_A_Prob", "forget_Q_A_ROUGE", "retain_Q_A_Prob")
OF_THE_MACHINE = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


def unlearn(folder, name, *overrides, launcher=()):
    """Start ``src/train.py`` on the embedded benchmark; what it says goes to the pipe."""
    command = [
        sys.executable, *launcher, str(SRC / "train.py"), "--config-name=unlearn",
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
        f"paths.output_dir={folder / name}", *overrides,
    ]  # fmt: skip
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = alone | {"OMP_NUM_THREADS": "1", "UNLORA_CACHE": str(folder / f"cache-{name}")}
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


@pytest.mark.slow  # it starts five Pythons, 40 s on one core
def test_two_processes_train_and_evaluate_as_one(tmp_path):
    tiny.llama(max_position_embeddings=512).save_pretrained(tmp_path / "root")
    tiny.tokenizer().save_pretrained(tmp_path / "root")
    size = "trainer.args.per_device_train_batch_size"
    started = [
        unlearn(tmp_path, "one", f"{size}=2"),
        unlearn(tmp_path, "two", f"{size}=1", launcher=TORCHRUN),
    ]
    said = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said[-1][-3000:]
    one, two = (json.loads((tmp_path / n / "manifest.json").read_text()) for n in NAMES)
    panels = [entry for entry in one["training"] if "eval_forget_Q_A_Prob" in entry]
    assert len(panels) == 3 and all(f"eval_{name}" in panels[0] for name in METRICS)
    assert panels[0]["eval_forget_Q_A_Prob"] != pytest.approx(
        panels[2]["eval_forget_Q_A_Prob"], rel=1e-2
    )
    steps = [entry for entry in one["training"] if "loss" in entry]
    assert len(steps) == 4 and all("forget_loss" in entry for entry in steps)
    nearly(one["training"], two["training"])
    nearly(one["summary"], two["summary"])
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in NAMES]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-4)
    assert one["effective_batch"] == two["effective_batch"] == 2
    nearly(*(json.loads((tmp_path / n / "evals" / "TOFU_EVAL.json").read_text()) for n in NAMES))
    # the second process leaves the talking to the first
    for line in ("finished: ", "tofu: not computed: forget_quality", "guard: gradients alive"):
        assert [text.count(line) for text in said] == [1, 1], line
