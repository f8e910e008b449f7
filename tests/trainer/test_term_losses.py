"""The terms' losses on micro-batches, without a Trainer."""

import pytest
import torch
from small_step import Stepper, lora_model
from small_trainer import LOSSES
from tiny import rows

from unlora.data.pairs import Parts


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("name", LOSSES)
def test_batch_layout_changes_nothing(name):
    """Rows have unequal lengths: a mean of micro-batch means would differ."""
    handler, method_args = LOSSES[name]
    whole, split = (
        Stepper(handler, method_args, model=lora_model(), layout=layout).run()
        for layout in ((16, 1), (4, 4))
    )
    assert any(g.abs().max() > 1e-4 for g in whole.gradients[0]), "nothing was learnt"
    # float32 sums in another order; terms of size 10 that nearly cancel
    assert split.log[0] == pytest.approx(whole.log[0], rel=1e-5, abs=1e-5)
    for one, other in zip(whole.gradients[0], split.gradients[0], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


def test_a_last_batch_that_is_not_full_is_a_mean_of_its_own_rows():
    parts = Parts({"forget": rows([3, 9, 1, 5, 2])}, "forget")
    whole, split, single = (
        Stepper("GradAscent", parts=parts, model=lora_model(), layout=layout).run(4)
        for layout in ((4, 1), (2, 2), (1, 4))
    )
    for run in (split, single):
        for one, other in zip(whole.log, run.log, strict=True):
            assert other == pytest.approx(one, rel=1e-5)


def test_the_terms_add_up():
    weights = {"retain_loss_type": "NLL", "gamma": 0.5, "alpha": 2.0}
    for entry in Stepper("NPO", weights, layout=(4, 1)).run(3).log:
        expected = 0.5 * entry["forget_loss"] + 2.0 * entry["retain_loss"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-6)
