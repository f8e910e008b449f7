"""The guards that watch a training run, called as Trainer calls them."""

from types import SimpleNamespace

import pytest
import tiny
import torch

from unlora.errors import GuardError
from unlora.trainer import Guards


def step(guards, model, *, rate, moves):
    """One step of a run under DeepSpeed: when Trainer tells of it, gradients are gone."""
    common = {
        "args": SimpleNamespace(deepspeed_plugin=object(), fp16=False),
        "state": None,
        "control": None,
        "model": model,
        "lr_scheduler": SimpleNamespace(get_last_lr=lambda: [rate]),
    }
    guards.on_step_begin(**common)
    if moves:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight += rate
    guards.on_pre_optimizer_step(**common)
    guards.on_step_end(**common)


def test_under_deepspeed_adapters_are_seen_to_move_once_there_is_a_learning_rate():
    guards, model = Guards(), tiny.adapted()
    assert all(p.grad is None for p in model.parameters())
    step(guards, model, rate=0.0, moves=True)
    assert guards.findings == {}
    step(guards, model, rate=0.1, moves=True)
    assert guards.findings["gradients alive"].startswith("7 lora_B moved; DeepSpeed keeps")


def test_under_deepspeed_adapters_that_do_not_move_stop_the_run():
    with pytest.raises(GuardError, match="gradients alive: 7 trainable .*did not move"):
        step(Guards(), tiny.adapted(), rate=0.1, moves=False)


def test_under_deepspeed_a_model_without_adapters_is_not_said_to_be_checked():
    guards = Guards()
    step(guards, tiny.llama(), rate=0.1, moves=False)
    assert guards.findings["gradients alive"].startswith("not checked")
