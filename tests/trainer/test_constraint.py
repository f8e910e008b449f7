"""The multiplier of a bound, step by step by hand; BLADE's steps between, and its end."""

import math

import pytest
import torch
from by_hand import added, gap, learnt, mean_logp, put, slope
from small_step import Stepper, draw, lora_model
from tiny import rows
from trainer.test_plugins import Steps
from trainer.test_trainer import losses, trainer_for

from unlora.data.pairs import Parts
from unlora.errors import InputError
from unlora.trainer import UnlearningLoss
from unlora.trainer import constraint as constraints
from unlora.trainer.constraint import AugmentedLagrangian

NLL = {"retain_loss_type": "NLL"}


# --- PDU -----------------------------------------------------------------------------------------

PDU = {"alpha": 2.0, "retain_loss_eps": 6.0, "dual_step_size": 0.5, "dual_warmup_epochs": 1}


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("layout", [(8, 1), (4, 2)])
def test_pdu_raises_lambda_by_what_is_above_the_bound(layout):
    steps = Stepper("PDU", NLL | PDU, layout=layout, learning_rate=3e-3).run(6)
    used, retain, forget, total = (
        [entry[name] for entry in steps.log]
        for name in ("multiplier", "retain_loss", "forget_loss", "loss")
    )
    # an epoch has two steps; the third is the first that may change lambda, for the fourth
    expected = 2.0
    for step in range(6):
        assert used[step] == pytest.approx(expected, rel=1e-5), step
        if step >= 2:
            expected = max(0.0, expected + 0.5 * (retain[step] - 6.0))
    assert steps.loss.constraint.multiplier == pytest.approx(expected, rel=1e-5)
    assert len(set(used)) == 4, "two steps of warm-up, then every step has its own"
    for step in range(6):
        assert total[step] == pytest.approx(forget[step] + used[step] * retain[step], rel=1e-5)


def test_pdu_weighs_the_retain_gradient_with_lambda():
    parts = Parts({"forget": rows([3, 1, 4]), "retain": rows([2, 5, 3], seed=1)}, "forget")
    settings = NLL | PDU | {"dual_warmup_epochs": 0.0, "gamma": 0.5}
    steps = Stepper("PDU", settings, parts=parts, layout=(8, 1), learning_rate=3e-3).run(2)
    used = [entry["multiplier"] for entry in steps.log]
    model, batches = steps.model, draw(parts, (8, 1))
    for epoch in range(2):
        put(model, steps.weights[epoch])
        (batch,) = next(batches)
        inputs = {key: batch["forget"][key] for key in ("input_ids", "attention_mask")}
        logits = model(**inputs).logits[:, :-1][batch["forget"]["labels"][:, 1:] != -100]
        margin = (logits.max(-1).values - logits.mean(-1)).square().mean()
        forget = [0.5 * g for g in slope(margin, model)]
        retain = slope(-mean_logp(model, batch["retain"]), model)
        assert gap(added(forget, retain, used[epoch]), steps.gradients[epoch]) < 1e-4
    assert used[1] != pytest.approx(used[0], rel=1e-2)


def test_lambda_is_never_negative_and_may_stay():
    pdu = constraints.build("PDU", {"dual_warmup_epochs": 0.0, "retain_loss_eps": 1.0}, 2.0)
    pdu.update(0.0, 0.9, 0.0)  # 2 + 5 * -0.1
    assert pdu.multiplier == pytest.approx(1.5) == pytest.approx(pdu.weight(0.9))
    pdu.update(0.0, 0.5, 0.0)  # 1.5 + 5 * -0.5 < 0
    assert pdu.multiplier == 0.0 and not pdu.converged
    fixed = constraints.build("PDU", {"primal_dual": False, "dual_warmup_epochs": 0.0}, 2.0)
    fixed.update(0.0, 9.0, 9.0)
    assert fixed.multiplier == 2.0
    late = constraints.build("PDU", {"dual_warmup_epochs": 2, "retain_loss_eps": 1.0}, 2.0)
    for epoch, expected in ((1.99, 2.0), (2.0, 7.0)):
        late.update(0.0, 2.0, epoch)
        assert late.multiplier == expected


@pytest.mark.parametrize(
    "handler, method_args, said",
    [
        ("PDU", {"dual_update_upon": "epoch"}, "lambda is updated with every optimiser step"),
        ("PDU", {"retain_loss_eps": "low"}, "retain_loss_eps of PDU is 'low'; it must be a number"),
        ("PDU", {"primal_dual": 1}, "primal_dual of PDU is 1; it must be true or false"),
        ("PDU", {"dual_stepsize": 1.0}, "Did you mean 'dual_step_size'?"),
        ("PDU", {"dual_step_size": -5.0}, "dual_step_size of PDU is -5.0; it must be 0 or more"),
        ("PDU", {"alpha": 0.0}, "holds the retain loss below a bound, so it needs both"),
        ("PDU", {"retain_loss_type": None}, "holds the retain loss below a bound"),
        ("BLADE", {"inner_steps": 1.5}, "inner_steps of BLADE is 1.5; it must be a whole number"),
        ("BLADE", {"inner_steps": -1}, "inner_steps of BLADE is -1; it must be 0 or more"),
        ("BLADE", {"rho": -0.1}, "rho of BLADE is -0.1; it must be 0 or more"),
        ("BLADE", {"retain_loss_eps": 1.0}, "Unknown parameter of objective BLADE"),
        ("BLADE", {"alpha": 0.0}, "holds the retain loss below a bound"),
    ],
)
def test_wrong_settings_are_refused_in_words(handler, method_args, said):
    with pytest.raises(InputError) as error:
        UnlearningLoss.build(handler, **NLL | method_args)
    assert said in str(error.value) and "\n" not in str(error.value)


# --- BLADE, on made-up losses --------------------------------------------------------------------


def blade(**settings):
    """With a bound of 1.0, once it has looked at retain losses of 1.0."""
    made = constraints.build("BLADE", {"eps_factor": 1.0} | settings, 1.0)
    assert isinstance(made, AugmentedLagrangian)
    return made


class Retain:
    """Inner steps with these losses, the last one for good."""

    def __init__(self, *values):
        self.values, self.rates = list(values), []

    def __call__(self, learning_rate):
        self.rates.append(learning_rate)
        return self.values.pop(0) if len(self.values) > 1 else self.values[0]


def steps_of(made, forget_losses, retain=1.0):
    """Run through steps with these losses; how many it takes until the end."""
    for number, loss in enumerate(forget_losses, 1):
        made.prepare(Retain(retain))
        made.weight(retain)
        made.update(loss, retain, 0.0)
        if made.converged:
            return number
    return None


def test_the_bound_is_found_in_the_first_round():
    made, inner = constraints.build("BLADE", {"inner_lr": 0.5}, 1.0), Retain(3.0, 2.0, 1.0, 9.0)
    made.prepare(inner)
    assert made.eps == pytest.approx(0.85 * 2.0)  # the mean of three
    assert inner.rates == [0.5] * 3
    made.prepare(Retain(7.0, 0.1, 0.1))
    assert made.eps == pytest.approx(0.85 * 2.0), "and stays"


def test_without_inner_steps_it_is_found_in_the_first_step():
    made = blade(inner_steps=0, eps_factor=0.5)
    made.prepare(Retain(9.0))
    assert math.isnan(made.eps)
    # r = 4 - 2: lambda + rho r = 1 + 0.1 * 2
    assert made.weight(4.0) == pytest.approx(1.2) and made.eps == 2.0
    made.update(1.0, 4.0, 0.0)
    assert made.multiplier == pytest.approx(1.2)


def test_lambda_rises_fast_and_falls_slowly():
    made = blade()
    made.prepare(Retain(1.0))
    expected = 1.0
    for retain in (1.5, 1.2, 0.4, 1.0, 0.2):
        excess = retain - 1.0
        # the gradient of lambda r + rho / 2 max(0, r) ** 2
        assert made.weight(retain) == pytest.approx(expected + 0.1 * max(0.0, excess))
        made.update(1.0, retain, 0.0)
        expected += 0.1 * excess * (1.0 if excess > 0 else 0.1)
        assert made.multiplier == pytest.approx(expected)
    made.multiplier = 0.101
    made.update(1.0, 0.0, 0.0)
    assert made.multiplier == 0.1


def test_rounds_are_added_while_the_retain_loss_is_far_off():
    def rounds(*values):
        made = blade()
        made.prepare(Retain(1.0))
        made.update(1.0, 5.0, 0.0)  # above 2 eps
        inner = Retain(*values)
        made.prepare(inner)
        return len(inner.rates) // 3

    assert rounds(1.5) == 1, "one round has put it right"
    assert rounds(9.0, 9.0, 9.0, 1.5) == 2
    assert rounds(9.0) == 4, "and no more than three are added"
    near = blade()
    near.prepare(Retain(1.0))
    near.update(1.0, 1.9, 0.0)
    inner = Retain(9.0)
    near.prepare(inner)
    assert len(inner.rates) == 3, "none where it was not far off"


FALLING = [0.5**i for i in range(40)]


def test_it_ends_once_the_forget_loss_has_been_low_for_a_while():
    """0.85 ** i of the smoothed loss: it is below 2 % of its first after some 25 steps."""
    smooth, low, number = 1.0, 0, 0
    for loss in FALLING:
        number += 1
        smooth += 0.15 * (loss - smooth)
        low = low + 1 if smooth < 0.02 else 0
        if low == 8:
            break
    assert number == steps_of(blade(), FALLING)
    assert steps_of(blade(patience=3), FALLING) == number - 5
    assert steps_of(blade(patience=20), FALLING) is None


def test_it_ends_where_the_forget_loss_stands_still_at_less_than_half():
    still = [1.0, 0.8, 0.6, 0.4] + [0.3] * 100
    number = steps_of(blade(), still)
    smooth, speed, top, slow, expected = 1.0, 0.0, 0.0, 0, 0
    for loss in still:
        expected += 1
        before, smooth = smooth, smooth + 0.15 * (loss - smooth)
        speed += 0.15 * (smooth - before - speed)
        top = max(top, abs(speed))
        slow = slow + 1 if abs(speed) < 0.01 * top and smooth <= 0.5 else 0
        if slow == 8:
            break
    assert number == expected and 20 < number < len(still)


@pytest.mark.parametrize(
    "forget_losses",
    [[1.0] * 200, [1.0 + 0.01 * i for i in range(200)], [1.0] + [0.6] * 200, [0.0] * 50],
)
def test_it_goes_on_where_the_forget_loss_has_not_halved(forget_losses):
    assert steps_of(blade(), forget_losses) is None


def test_the_steps_must_be_in_a_row():
    low = 30  # see above: the loss has been low since step 25
    made = blade(patience=8)
    assert steps_of(made, FALLING[:low]) is None and made.still_for > 0
    made.update(1.0, 1.0, 0.0)
    assert made.still_for == 0
    assert steps_of(made, [0.0] * 100) > 8


def test_a_bound_that_was_broken_late_keeps_it_from_ending_early():
    def end(broken):
        made = blade()
        for number, loss in enumerate(FALLING + [0.0] * 200, 1):
            made.prepare(Retain(3.0 if number in broken else 1.0))
            made.update(loss, 3.0 if number in broken else 1.0, 0.0)
            if made.converged:
                return number, made.hit_at
        return None

    usual, hit = end(())
    assert math.isnan(hit)
    assert end((20, 21))[0] == usual, "two in a row are not enough"
    # seen at the start of steps 11, 12 and 13: the first that broke it was step 10
    late, hit = end((11, 12, 13))
    assert hit == 10 and late == usual, "step 16 is before the loss is low"
    late, hit = end((21, 22, 23))
    # from step 1.6 * 20 on, eight in a row
    assert hit == 20 and late == 32 + 7 > usual


def test_everything_that_changes_is_kept_and_put_back():
    one = blade()
    steps_of(one, FALLING[:9], retain=1.3)
    other = blade()
    assert constraints.state(one) != constraints.state(other)
    constraints.restore(other, constraints.state(one))
    assert str(constraints.state(one)) == str(constraints.state(other)), "NaN among them"
    assert steps_of(one, FALLING[9:]) == steps_of(other, FALLING[9:]) is not None


# --- BLADE, in the trainer -----------------------------------------------------------------------

ONE_ROW = {"forget": rows([3, 1, 4, 2]), "retain": rows([5], seed=1)}


def gradient_descent(model, row, *, learning_rate, longest, num_steps):
    """The weights after some steps of plain gradient descent on one row, and its losses before."""
    found = []
    for _ in range(num_steps):
        loss = -mean_logp(model, row)
        g = slope(loss, model)
        size = float(torch.cat([x.flatten() for x in g]).norm())
        step = learning_rate * (min(1.0, longest / size) if longest else 1.0)
        put(model, added(learnt(model), g, -step))
        found.append(float(loss.detach()))
    return [p.detach().clone() for p in learnt(model)], found


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("longest", [0.0, 0.5])
def test_the_inner_steps_are_plain_gradient_descent_on_retain_rows(longest):
    """There is one retain row, so every draw is known; the outer learning rate is 0."""
    steps = Stepper(
        "BLADE", NLL | {"inner_steps": 2, "inner_lr": 0.02, "eps_factor": 0.9},
        parts=Parts(ONE_ROW, "forget"), layout=(2, 2), learning_rate=0.0, max_grad_norm=longest,
    ).run(2)  # fmt: skip
    model = lora_model(init_lora_weights=False)
    row = next(draw(steps.parts, (2, 2)))[0]["retain"]
    start = learnt(model)
    how = {"learning_rate": 0.02, "longest": longest}
    for step in range(2):
        before = [p.detach().clone() for p in start]
        expected, found = gradient_descent(model, row, num_steps=2, **how)
        assert gap(before, expected) > 1e-4
        assert gap(expected, steps.weights[step]) < 1e-6
        if step == 0:
            assert steps.loss.constraint.eps == pytest.approx(0.9 * sum(found) / 2, rel=1e-5)


def drawn_rows(layout, **args):
    """The tokens of the retain rows that the inner steps of two steps see, in order."""
    parts = Parts({"forget": rows([2] * 8), "retain": rows([3] * 50, seed=1)}, "forget")
    steps = Stepper("BLADE", NLL, parts=parts, layout=layout, **args)
    seen, usual = [], steps.composed._inner_step

    def watched(model, *args):
        handle = model.get_input_embeddings().register_forward_hook(
            lambda _m, said, _o: here.extend(said[0].flatten().tolist())  # rows lie end to end
        )
        here = []
        value = usual(model, *args)
        handle.remove()
        seen.append(here)
        return value

    steps.composed._inner_step = watched
    steps.run(2)
    return seen


@pytest.mark.slow
def test_the_inner_steps_see_fresh_rows_whatever_the_layout():
    whole = drawn_rows((8, 1))
    assert whole == drawn_rows((2, 4))
    assert len(whole) == 6 and all(len(draw) == 8 * 7 for draw in whole)
    assert len(set(map(tuple, whole))) == 6, "every inner step has its own"
    assert drawn_rows((8, 1), seed=7) != whole


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("layout", [(8, 1), (2, 4)])
def test_a_step_costs_its_terms_and_the_inner_steps(layout):
    steps = Stepper("BLADE", NLL | {"inner_steps": 4, "inner_lr": 1e-5}, layout=layout)
    passes = []
    steps.model.get_input_embeddings().register_forward_hook(lambda *_: passes.append(1))
    for _ in range(2):
        passes.clear()
        steps.run()
        assert len(passes) == (2 + 4) * layout[1]


FEW = {"forget": rows([3, 1, 4, 2, 5, 1]), "retain": rows([5, 2, 6, 1, 3], seed=1)}


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(6, 1), (3, 2)])
def test_a_run_that_has_forgotten_stops_by_itself(tmp_path, layout):
    """The last step is made and logged like every other."""
    model, steps = lora_model(init_lora_weights=False), Steps()
    trainer = trainer_for(
        tmp_path, UnlearningLoss.build("BLADE", **NLL, patience=2, tau=0.8), model,
        parts=Parts(FEW, "forget"), callbacks=[steps], max_steps=100, optim="adamw_torch",
        per_device_train_batch_size=layout[0], gradient_accumulation_steps=layout[1],
    )  # fmt: skip
    trainer.train()
    made = trainer.loss.constraint
    forget = losses(trainer, "forget_loss")
    assert made.converged and made.smooth_loss < 0.5 * forget[0]
    assert trainer.state.global_step == len(steps.weights) == len(forget) == made.steps < 100
    assert gap(steps.weights[-1], learnt(trainer.model)) > 1e-6, "the last step moved the weights"


@pytest.mark.slow
def test_a_step_of_several_micro_batches_is_made_to_its_end_before_a_run_stops(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(AugmentedLagrangian, "converged", property(lambda self: self.steps >= 2))
    model, steps = lora_model(init_lora_weights=False), Steps()
    trainer = trainer_for(
        tmp_path, UnlearningLoss.build("BLADE", **NLL), model, parts=Parts(FEW, "forget"),
        callbacks=[steps], max_steps=5, per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == len(steps.weights) == len(losses(trainer)) == 2
    assert gap(steps.weights[-1], learnt(trainer.model)) > 1e-6, "the last step moved the weights"


@pytest.mark.parametrize("retain", ["KL", "JSD"])
def test_blade_needs_a_retain_loss_that_is_not_0_at_the_start(retain):
    with pytest.raises(InputError, match=f"which is 0 for {retain}. Set .*=NLL"):
        UnlearningLoss.build("BLADE", retain_loss_type=retain)
