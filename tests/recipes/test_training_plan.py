"""What a config says is checked and joined before any weights are read."""

from pathlib import Path

import pytest
import torch
from recipes.test_train import TRAINING, config, folder, weights  # noqa: F401
from safetensors.torch import save_file

from unlora.config import read
from unlora.errors import InputError
from unlora.recipes.training_plan import TrainingPlan


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
