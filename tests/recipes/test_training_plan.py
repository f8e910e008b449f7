"""What a config says is checked and joined before any weights are read."""

import json
from pathlib import Path

import pytest
import torch
from recipes.test_train import TRAINING, config, folder, weights  # noqa: F401
from safetensors.torch import load_file, save_file

from unlora.config import read
from unlora.errors import InputError
from unlora.recipes import train
from unlora.recipes.training_plan import TrainingPlan
from unlora.trainer import batch_layout
from unlora.trainer.batch_layout import Choices


def plan(*overrides, **kwargs):
    cfg = config("unlearn", "unlearn/pocket/lora", "trainer=NPO", weights("root"), *TRAINING,
                 "trainer.args.report_to=none", *overrides)  # fmt: skip
    return TrainingPlan.check(read(cfg), **kwargs)


def test_a_plan_is_made_without_weights(folder):  # noqa: F811
    for file in folder.glob("root/*.safetensors"):
        save_file({"x": torch.zeros(1)}, file)
    checked = plan("trainer.args.gradient_accumulation_steps=3")
    assert checked.loss.handler == "NPO" and checked.resume is None
    assert checked.batch_layout == {"rows": 2, "accumulation": 3, "processes": 1}
    assert checked.effective_batch == 6
    assert checked.args.report_to == []  # trackers outlast the trainer
    assert not Path(checked.folder).exists()


@pytest.mark.slow
def test_what_is_not_evaluated_needs_no_suites(folder):  # noqa: F811
    assert plan().config.eval and not plan(evaluate=False).config.eval


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    "override, sentence",
    [
        ("trainer.method_args.beta=-1", "beta"),
        ("trainer.args.optim=nothing", "nothing is not a valid OptimizerNames"),
        ("trainer.args.resume_from_checkpoint=true", "checkpoint"),
        ("model.lora_config.target_modules=[nowhere]", "nowhere"),
    ],
)
def test_a_mistake_is_said_by_the_plan(folder, override, sentence):  # noqa: F811
    with pytest.raises(InputError, match=sentence):
        plan(override)


AUTO = ("trainer.args.per_device_train_batch_size=auto", "global_batch_size=6")


def as_on_a_gpu(monkeypatch):
    """Let a plan choose as it would on a GPU with much memory."""

    def choices(*args):
        *first, _available, _gpu, checkpointing = args
        return Choices(*first, 1 << 40, True, checkpointing)

    monkeypatch.setattr(batch_layout, "Choices", choices)


def test_the_rows_at_once_are_chosen_and_those_of_a_step_stay(folder, monkeypatch, caplog):  # noqa: F811
    checked = plan(*AUTO)
    assert checked.batch_layout == {"rows": 3, "accumulation": 2, "processes": 1}
    checked.load_data()
    assert checked.batch_layout == {"rows": 3, "accumulation": 2, "processes": 1}
    as_on_a_gpu(monkeypatch)
    caplog.set_level("INFO")
    checked.load_data()
    assert checked.batch_layout == {"rows": 6, "accumulation": 1, "processes": 1}
    assert not checked.args.gradient_checkpointing
    assert any(line.startswith("6 of the 6 rows of a step at once") for line in caplog.messages)


def test_rows_that_are_chosen_train_the_adapter_of_those_that_are_set(folder, monkeypatch):  # noqa: F811
    def trained(name, *overrides):
        words = ["trainer=NPO", weights("root"), *TRAINING, "model.lora_config.lora_dropout=0.1"]
        words += ["trainer.args.report_to=none", "eval=null", f"task_name={name}", *overrides]
        train.run(config("unlearn", "unlearn/pocket/lora", *words))
        run = folder / "saves" / "unlearn" / name
        layout = json.loads((run / "manifest.json").read_text())["batch_layout"]
        return load_file(run / "adapter_model.safetensors"), layout["rows"]

    fixed, few = trained("fixed", "trainer.args.gradient_accumulation_steps=3")
    as_on_a_gpu(monkeypatch)
    auto, all_at_once = trained("auto", *AUTO)
    assert (few, all_at_once) == (2, 6)
    assert max(float(x.abs().max()) for x in fixed.values()) > 1e-2
    for name, value in fixed.items():
        torch.testing.assert_close(auto[name], value, rtol=0, atol=1e-5)
