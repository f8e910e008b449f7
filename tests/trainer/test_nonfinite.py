"""One planted NaN or infinity each, in a loss or in a gradient."""

import math
from itertools import product

import pytest
import torch
from small_trainer import METHODS, small_trainer, trained
from transformers import TrainerCallback

from unlora.errors import GuardError, InputError
from unlora.trainer import Divergence, Guards
from unlora.trainer.nonfinite import finite


def planted(trainer, *steps, value=math.nan, where="loss"):
    """Let the loss or the gradient of these steps (from 1) be no number."""
    if where == "gradient":
        parameter = next(p for p in trainer.model.parameters() if p.requires_grad)

        def spoil(gradient):
            return gradient * value if trainer.state.global_step + 1 in steps else gradient

        parameter.register_hook(spoil)
        return trainer
    losses = trainer.context.losses.compute

    def spoilt(*args, **kwargs):
        found = losses(*args, **kwargs)
        if trainer.state.global_step + 1 in steps:
            found = {name: loss * value for name, loss in found.items()}
        return found

    trainer.context.losses.compute = spoilt
    return trainer


class Weights(TrainerCallback):
    """The trained weights before the first step and after every one."""

    def __init__(self):
        self.after = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.on_step_end(args, state, control, model)

    def on_step_end(self, args, state, control, model, **kwargs):
        found = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        self.after.append(found)


def same(one, other):
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


def cases(covering, *values):
    """All combinations, of which only some are in the default run."""
    return [
        pytest.param(*case, marks=() if case in covering else pytest.mark.slow)
        for case in product(METHODS, *values)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, where",
    cases({("NPO", "gradient"), ("RMU", "loss"), ("BLADE", "loss"), ("GRU+SAM", "gradient")},
          ["loss", "gradient"]),
)  # fmt: skip
def test_the_run_stops_in_words_and_its_checkpoint_is_kept(tmp_path, method, where):
    trainer = small_trainer(tmp_path, method, save_strategy="steps", save_steps=2)
    with pytest.raises(GuardError) as said:
        planted(trainer, 3, where=where).train()
    message = str(said.value)
    handler = METHODS[method][0]
    assert ("_loss is nan" if where == "loss" else "gradient is not finite") in message or (
        where == "gradient" and "_loss is nan" in message  # SAM meets it a pass later
    )
    assert f"at step 3 ({handler}), on the rows " in message and "of retain" in message
    assert f"The last checkpoint is kept: {tmp_path / 'checkpoint-2'}." in message
    assert "\n" not in message and "on_divergence=skip" in message
    again = small_trainer(tmp_path, method)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(weight.isfinite().all() for weight in trained(again).values())


@pytest.mark.slow
def test_the_rows_it_names_are_those_of_the_micro_batch(tmp_path):
    trainer = small_trainer(tmp_path, per_device_train_batch_size=2)
    planted(trainer, 1)
    seen = []
    batches = trainer.get_batch_samples
    trainer.get_batch_samples = lambda *args: seen.append(batches(*args)) or seen[-1]
    with pytest.raises(GuardError) as said:
        trainer.train()
    batch = seen[0][0][0]
    for part in ("forget", "retain"):
        numbers = ", ".join(map(str, batch[part]["number"].tolist()))
        assert f"{numbers} of {part}" in str(said.value)
    assert "There is no checkpoint: set trainer.args.save_strategy=epoch." in str(said.value)


# each method, and each value at each place, once or more
LEFT_OUT = {
    ("NPO", "loss", math.nan), ("NPO", "gradient", math.inf), ("RMU", "gradient", math.nan),
    ("PDU", "loss", math.inf), ("BLADE", "loss", math.nan), ("GRU+SAM", "gradient", math.inf),
}  # fmt: skip


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    "method, where, value", cases(LEFT_OUT, ["loss", "gradient"], [math.nan, math.inf])
)
def test_a_step_that_is_left_out_changes_nothing(tmp_path, method, where, value):
    divergence, weights = Divergence("skip"), Weights()
    trainer = small_trainer(
        tmp_path, method, divergence=divergence, callbacks=[Guards(divergence), weights],
        gradient_accumulation_steps=2, per_device_train_batch_size=2,
    )  # fmt: skip
    remembered = {}

    class Memory(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            remembered[state.global_step] = trainer.context.state.state_dict()

    trainer.add_callback(Memory())
    planted(trainer, 2, value=value, where=where).train()
    assert divergence.facts == {"on_divergence": "skip", "left_out": [2]}
    assert same(weights.after[1], weights.after[2]) and not same(*weights.after[2:4])
    assert all(weight.isfinite().all() for weight in trained(trainer).values())
    for name, tensor in remembered[1].items():
        torch.testing.assert_close(remembered[2][name], tensor, rtol=0, atol=0, equal_nan=True)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4 and all(map(math.isfinite, logged)), "later losses are numbers again"
    moments = next(iter(trainer.optimizer.state.values()))
    assert moments["step"] == 3 and trainer.state.global_step == 4


@pytest.mark.slow
def test_a_first_step_that_is_left_out_does_not_alarm_the_guard(tmp_path):
    divergence = Divergence("skip")
    guards = Guards(divergence)
    trainer = small_trainer(tmp_path, divergence=divergence, callbacks=[guards])
    planted(trainer, 1, where="gradient").train()
    assert divergence.left_out == [1]
    assert "every lora_B moved" in guards.findings["gradients alive"]


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("clipped", [0.0, 1.0])
def test_a_loss_scaler_takes_a_step_that_is_left_out(tmp_path, monkeypatch, clipped):
    divergence = Divergence("skip")
    trainer = small_trainer(tmp_path, divergence=divergence, max_grad_norm=clipped)
    trainer.args.fp16 = True  # which is refused without a GPU
    accelerator = trainer.accelerator
    monkeypatch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu", init_scale=4.0))
    monkeypatch.setattr(accelerator, "native_amp", True)
    monkeypatch.setitem(accelerator.state.__dict__, "_mixed_precision", "fp16")
    losses = trainer.context.losses.compute

    def spoilt(*args, **kwargs):  # with a gradient that is finite
        more = math.inf if trainer.state.global_step == 1 else 0
        return {name: loss + more for name, loss in losses(*args, **kwargs).items()}

    trainer.context.losses.compute = spoilt
    trainer.train()
    assert divergence.left_out == [2] and trainer.state.global_step == 4
    assert all(weight.isfinite().all() for weight in trained(trainer).values())


@pytest.mark.slow
def test_three_in_a_row_stop_the_run(tmp_path):
    trainer = small_trainer(tmp_path, divergence=Divergence("skip"), max_steps=9)
    with pytest.raises(GuardError, match="at step 6 .*So were the 2 steps before"):
        planted(trainer, 2, 4, 5, 6).train()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["NPO", pytest.param("PDU", marks=pytest.mark.slow), "BLADE"])
def test_a_rollback_goes_back_to_the_copy_and_on_with_the_next_rows(tmp_path, method):
    divergence, weights = Divergence("rollback"), Weights()
    trainer = small_trainer(
        tmp_path, method, divergence=divergence, callbacks=[weights], max_steps=14
    )
    planted(trainer, 4, 13).train()
    assert divergence.facts["rolled_back"] == [(4, 1), (13, 11)]
    assert same(weights.after[4], weights.after[0]) and not same(*weights.after[3:5])
    assert same(weights.after[13], weights.after[10])
    rates = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    assert rates == sorted(rates, reverse=True), "the schedule goes on"


@pytest.mark.slow
def test_a_copy_that_led_to_a_rollback_is_not_gone_back_to(tmp_path):
    divergence = Divergence("rollback")
    trainer = small_trainer(tmp_path, divergence=divergence, max_steps=14)
    planted(trainer, 11, 13).train()  # the copy of step 11 has not had one good step
    assert divergence.rollbacks == [(11, 1), (13, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_resumed_run_leaves_out_and_goes_back_as_the_whole_one(tmp_path, policy):
    ended = []
    for resume in (None, str(tmp_path / "checkpoint-7")):
        divergence = Divergence(policy)
        trainer = small_trainer(
            tmp_path, divergence=divergence, max_steps=12, save_strategy="steps", save_steps=7
        )
        planted(trainer, 4, 8, 10).train(resume_from_checkpoint=resume)
        ended.append((divergence.facts, trained(trainer)))
    (facts, weights), (again, resumed) = ended
    assert facts == again and facts["left_out"] == [4, 8, 10]
    # the step after the checkpoint has no copy that is known to be good
    assert facts.get("rolled_back") == ([(4, 1), (10, 8)] if policy == "rollback" else None)
    assert same(weights, resumed)


@pytest.mark.slow
def test_a_run_goes_back_three_times_at_most(tmp_path):
    trainer = small_trainer(tmp_path, divergence=Divergence("rollback"), max_steps=12)
    with pytest.raises(GuardError, match="at step 9 .*gone back 3 times already"):
        planted(trainer, 3, 5, 7, 9).train()


def test_what_needs_the_whole_gradient_is_refused_without_it(tmp_path):
    trainer = small_trainer(tmp_path)
    with pytest.raises(InputError, match="Set trainer.on_divergence=stop"):
        Divergence("skip").watch(trainer.context, split=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_number_among_many_is_seen(bad):
    good = [torch.ones(3), None, torch.full((2, 2), 3e38)]
    assert finite(good) and finite([None])
    spoilt = torch.ones(5)
    spoilt[3] = bad
    assert not finite([*good, spoilt])
