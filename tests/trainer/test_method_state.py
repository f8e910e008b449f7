"""What a method remembers beside the weights, in checkpoints and snapshots."""

import pytest
import torch
from small_step import Stepper
from small_trainer import RETAIN

from unlora.trainer.snapshot import Snapshot

METHODS = {
    "RMU": ("RMU", {"layer": 0, "retain_loss_type": "EMBED_DIFF"}, {}, "drawn.control"),
    "PDU": ("PDU", RETAIN | {"dual_warmup_epochs": 0}, {}, "constraint.multiplier"),
    "BLADE": ("BLADE", RETAIN, {}, "constraint.eps"),
    "GRU": ("NPO", RETAIN, {"GRU": {}}, "retain_average.0"),
}


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(torch.nan_to_num(value), torch.nan_to_num(other[name]))
        for name, value in one.items()
    )


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("name", METHODS)
def test_it_is_put_back_as_it_was_saved(name):
    handler, method_args, plugins, key = METHODS[name]
    steps = Stepper(handler, method_args, plugins, layout=(4, 1)).run()
    saved = steps.context.state.state_dict()
    assert key in saved
    other = Stepper(handler, method_args, plugins, layout=(4, 1), seed=3)
    assert not same(other.context.state.state_dict(), saved)
    other.context.state.load_state_dict(saved | {"divergence.left_out": torch.tensor([2])})
    assert same(other.context.state.state_dict(), saved)


def test_a_method_without_memory_has_no_state():
    assert Stepper("NPO", RETAIN).run().context.state.state_dict() == {}


@pytest.mark.parametrize("name", ["PDU", "GRU"])
def test_a_snapshot_puts_weights_optimiser_and_state_back_and_no_learning_rate(name):
    handler, method_args, plugins, _ = METHODS[name]
    steps = Stepper(handler, method_args, plugins, layout=(4, 1), learning_rate=0.0).run()
    trained, state = steps.context.trained, steps.context.state
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1)

    def step():
        steps.compute_gradients(steps.batches())
        optimizer.step()

    step()
    snapshot = Snapshot.take(trained, optimizer, state)
    weights = {name: p.detach().clone() for name, p in trained.items()}
    moments = [entry["exp_avg"].clone() for entry in optimizer.state_dict()["state"].values()]
    remembered = state.state_dict()
    step()
    optimizer.param_groups[0]["lr"] = 0.05
    assert not same(weights, trained) and not same(state.state_dict(), remembered)
    for _ in range(2):  # the copy is not that of the run
        snapshot.restore(trained, optimizer, state)
        assert same(weights, trained) and same(state.state_dict(), remembered)
        now = [entry["exp_avg"] for entry in optimizer.state_dict()["state"].values()]
        assert all(map(torch.equal, moments, now))
        assert optimizer.param_groups[0]["lr"] == 0.05
        step()
