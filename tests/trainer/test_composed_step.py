"""The gradient of a composed step, against the papers' formulas computed with autograd alone."""

import math

import pytest
import torch
from by_hand import (
    CLOSE,
    added,
    gap,
    learnt,
    length,
    mean_logp,
    npo_rows,
    put,
    row_logps,
    slope,
)
from small_step import Stepper, draw, lora_model
from small_trainer import LAYOUTS, LENGTHS
from tiny import rows

from unlora.data.pairs import Parts
from unlora.trainer.composed_step import NonFiniteLoss
from unlora.trainer.gradients import dot, ema, perturbed, project_out_conflict, robust_weights
from unlora.trainer.plugins import BalDRO

NLL = {"retain_loss_type": "NLL"}
WEIGHTED = NLL | {"gamma": 0.5, "alpha": 2.0}


# --- SAM -----------------------------------------------------------------------------------------


def by_row(model, batch):
    return npo_rows(model, batch).mean()


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("handler, forget", [("GradDiff", mean_logp), ("NPO", by_row)])
@pytest.mark.parametrize("layout", [(16, 1), (4, 4)])
def test_sam_takes_the_forget_gradient_where_it_is_worst_nearby(handler, forget, layout):
    steps = Stepper(handler, WEIGHTED, {"SAM": {"rho": 0.3}}, layout=layout).run()
    model = steps.model
    put(model, steps.weights[0])
    (batch,) = next(draw(steps.parts, (16, 1)))
    there = slope(forget(model, batch["forget"]), model)
    retain = slope(-mean_logp(model, batch["retain"]), model)
    put(model, added(steps.weights[0], there, 0.3 / length(there)))
    moved = slope(forget(model, batch["forget"]), model)
    assert gap(moved, there) > 1e-2
    halved, doubled = [0.5 * g for g in moved], [2.0 * g for g in retain]
    assert gap(added(halved, doubled), steps.gradients[0]) < CLOSE


def test_sam_gives_the_weights_back_bit_by_bit():
    steps = Stepper("NPO", NLL, {"SAM": {"rho": 3.0}})
    before = [p.detach().clone() for p in learnt(steps.model)]
    steps.run()
    assert all(map(torch.equal, before, steps.weights[0]))
    drawn = [torch.randn_like(p) for p in before]
    with pytest.raises(KeyboardInterrupt), perturbed(before, drawn, 0.7):
        kept = [p.clone() for p in before]
        raise KeyboardInterrupt
    assert float(length(added(steps.weights[0], kept, -1))) == pytest.approx(0.7, rel=1e-5)
    assert all(map(torch.equal, before, steps.weights[0])), "also where the pass fails"


# --- GRU -----------------------------------------------------------------------------------------


def test_gru_projects_against_a_moving_average_of_the_retain_gradient():
    # some rows are in both parts, so ascent and descent are at odds
    data = {"forget": rows(LENGTHS["forget"]), "retain": rows(LENGTHS["forget"][:10])}
    steps = Stepper(
        "GradDiff", NLL | {"alpha": 0.25}, {"GRU": {"moving_avg": 0.6}},
        parts=Parts(data, "forget"), learning_rate=1e-3, layout=(8, 1),
    ).run(3)  # fmt: skip
    model, average, against, turned = steps.model, None, [], []
    batches = draw(steps.parts, (8, 1))
    for weights, (batch,), found in zip(steps.weights, batches, steps.gradients, strict=False):
        put(model, weights)
        forget = slope(mean_logp(model, batch["forget"]), model)
        retain = slope(-mean_logp(model, batch["retain"]), model)
        newest = [0.6 * g for g in retain]
        average = added(newest, average, 0.4) if average else newest
        flat, other = (torch.cat([g.flatten() for g in x]) for x in (forget, average))
        against.append(float(flat @ other))
        share = min(against[-1], 0.0) / float(other @ other)
        expected = added(added(forget, average, -share), retain, 0.25)
        assert gap(expected, found) < CLOSE
        assert gap(expected, added(forget, retain, 0.25)) > 1e-2, "it makes a difference"
        turned.append(gap(added(forget, average, -share), project_out_conflict(forget, retain)))
    assert max(against) < 0 and len(against) == 3
    assert turned[0] < CLOSE < 1e-3 < turned[1], "the average counts from step 2 on"


def test_gru_changes_nothing_where_the_gradients_agree():
    names = ("forget", "retain", "alternate")
    parts = Parts({part: rows(LENGTHS["forget"]) for part in names}, "forget")
    found = []
    for given in ({"GRU": {}}, {}):
        # both terms learn the same rows
        found.append(Stepper("IdkNLL", NLL, given, parts=parts, layout=(8, 1)).run(2))
    for one, other in zip(found[0].gradients, found[1].gradients, strict=True):
        assert gap(one, other) < CLOSE


def test_the_rectified_gradient_has_nothing_against_the_retain_gradient():
    retain = [torch.tensor([1.0, 0.0]), torch.tensor([2.0])]
    agreeing = [torch.tensor([2.0, 5.0]), torch.tensor([-1.0])]  # inner product 2 - 2 = 0
    assert project_out_conflict(agreeing, retain) is agreeing
    # <f, r> = -4 + 2 * -3 = -10, |r|^2 = 5, so f + 2 r
    forget = [torch.tensor([-4.0, 5.0]), torch.tensor([-3.0])]
    first, second = project_out_conflict(forget, retain)
    assert first.tolist() == [-2.0, 5.0] and second.tolist() == [1.0]
    assert float(dot([first, second], retain)) == 0.0


def test_the_average_starts_at_zero():
    once = ema(None, [torch.tensor([2.0])], 0.8)
    assert once[0].item() == pytest.approx(1.6)
    assert ema(once, [torch.tensor([-1.0])], 0.8)[0].item() == pytest.approx(-0.48)


# --- BalDRO --------------------------------------------------------------------------------------


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("handler, rows_of", [("GradDiff", row_logps), ("NPO", npo_rows)])
@pytest.mark.parametrize("variant", ["DV", "G"])
@pytest.mark.parametrize("layout", [(16, 1), (4, 4)])
def test_baldro_weighs_the_rows_of_the_effective_batch(handler, rows_of, variant, layout):
    settings = {"variant": variant, "beta": 1.5, "share": 0.25}
    steps = Stepper(handler, WEIGHTED, {"BalDRO": settings}, layout=layout).run()
    model = steps.model
    put(model, steps.weights[0])
    (batch,) = next(draw(steps.parts, (16, 1)))

    def robust():
        losses = rows_of(model, batch["forget"])
        if variant == "DV":
            return 1.5 * (losses / 1.5).exp().mean().log()
        return losses.sort().values[-4:].mean()  # a quarter of 16 rows

    forget = slope(robust(), model)
    assert gap(forget, slope(rows_of(model, batch["forget"]).mean(), model)) > 1e-2
    retain = slope(-mean_logp(model, batch["retain"]), model)
    assert gap(added([0.5 * g for g in forget], retain, 2.0), steps.gradients[0]) < CLOSE


def test_the_weights_of_the_rows_are_those_of_the_formula():
    losses = torch.tensor([1.0, 3.0, 2.0, 0.0, 2.5])
    # d/dl of beta log mean exp(l / beta) is the softmax
    given = losses.clone().requires_grad_()
    (4.0 * (given / 4.0).exp().mean().log()).backward()
    weights = robust_weights(losses, BalDRO("DV", beta=4.0))
    torch.testing.assert_close(weights, given.grad)
    assert robust_weights(losses, BalDRO("G", share=0.4)).tolist() == [0, 0.5, 0, 0, 0.5]
    assert robust_weights(losses, BalDRO("G", share=0.01)).tolist() == [0, 1, 0, 0, 0]
    torch.testing.assert_close(robust_weights(losses, BalDRO("G", share=1)), torch.full((5,), 0.2))
    # a softmax of summed log-likelihoods must not overflow
    assert robust_weights(torch.tensor([4000.0, 3999.0]), BalDRO(beta=1.0)).sum() == 1


def test_a_row_whose_tokens_are_all_left_out_has_no_say():
    """CEU leaves out the first token, and the only one of some rows."""
    parts = Parts({"forget": rows([1, 4, 1, 3, 1, 5])}, "forget")
    less = Parts({"forget": [row for row in parts.rows["forget"] if len(row.labels) > 5]}, "forget")
    found = []
    for data in (parts, less):
        skips = {"ignore_first_n_answer_tokens": 1}
        steps = Stepper("CEU", skips, {"BalDRO": {"variant": "DV", "beta": 4.0}}, parts=data)
        found.append(steps.run().gradients[0])
    assert gap(*found) < CLOSE


# --- layouts -------------------------------------------------------------------------------------


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("name", LAYOUTS)
def test_batch_layout_changes_nothing(name):
    """Rows have unequal lengths: a mean of micro-batch means would differ."""
    handler, given, method_args = LAYOUTS[name]
    whole, split = (
        Stepper(handler, method_args, given, layout=layout, learning_rate=1e-3).run(2)
        for layout in ((16, 1), (8, 2))
    )
    assert gap(whole.weights[0], learnt(whole.model)) > 1e-5, "nothing was learnt"
    for one, other in zip(whole.log, split.log, strict=True):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-5)
    for weight, other in zip(learnt(whole.model), learnt(split.model), strict=True):
        torch.testing.assert_close(other, weight, rtol=1e-4, atol=1e-6)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("handler", ["GradDiff", "BLADE"])
def test_a_last_batch_that_is_not_full_changes_nothing_either(handler):
    parts = Parts({"forget": rows([3, 9, 1, 5, 2]), "retain": rows([2, 7, 5, 1, 6, 4])}, "forget")
    whole, split = (
        Stepper(handler, NLL, {"BalDRO": {}}, parts=parts, layout=layout, learning_rate=1e-3).run(2)
        for layout in ((4, 1), (1, 4))
    )
    for one, other in zip(whole.log, split.log, strict=True):
        # a sum of two terms of size 10 that nearly cancel
        assert other == pytest.approx(one, rel=1e-5, abs=1e-5)


@pytest.mark.slow
@pytest.mark.default_cases(1)
@pytest.mark.parametrize("name", ["PDU", "BLADE", "GRU", "BalDRO"])
def test_nor_does_it_with_dropout(name):
    """A row drops the same channels in every layout; in float64 nothing else could differ."""
    handler, given, method_args = LAYOUTS[name]
    whole, split = (
        Stepper(
            handler, method_args, given, layout=layout, learning_rate=1e-3,
            model=lora_model(lora_dropout=0.05, init_lora_weights=False).double(),
        ).run(2)
        for layout in ((16, 1), (4, 4))
    )  # fmt: skip
    for weight, other in zip(learnt(whole.model), learnt(split.model), strict=True):
        torch.testing.assert_close(other, weight, rtol=0, atol=1e-12)


# --- what is undone ------------------------------------------------------------------------------


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("name", ["PDU", "BLADE and all three", "GRU"])
def test_a_step_that_is_undone_leaves_weights_and_state_as_they_were(name):
    handler, given, method_args = LAYOUTS[name]
    steps = Stepper(handler, method_args, given, layout=(8, 1)).run()
    weights = [p.detach().clone() for p in learnt(steps.model)]
    before, batches = steps.context.state.state_dict(), steps.batches()
    steps.compute_gradients(batches)
    changed = steps.context.state.state_dict()
    assert any(not torch.equal(changed[key], value) for key, value in before.items())
    steps.composed.undo()
    assert all(map(torch.equal, weights, learnt(steps.model)))
    for key, value in steps.context.state.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("term", ["forget", "retain"])
def test_a_loss_that_is_not_finite_ends_the_step(term, value):
    steps = Stepper("NPO", NLL, {"GRU": {}}, layout=(4, 4))
    compute, batches = steps.context.losses.compute, steps.batches()

    def spoilt(model, batch, *args, **kwargs):
        losses = compute(model, batch, *args, **kwargs)
        return {n: loss * value if n == term and batch is batches[1] else loss
                for n, loss in losses.items()}  # fmt: skip

    steps.context.losses.compute = spoilt
    steps.splitter._split_all = lambda: batches
    with pytest.raises(NonFiniteLoss) as error:
        steps.compute_gradients(batches)
    assert error.value.name == f"{term}_loss" and not math.isfinite(error.value.value)
    assert error.value.batches is batches and not steps.context.means.gather()
    steps.composed.undo()
    assert steps.context.state.retain_average is None


@pytest.mark.slow
def test_a_penalty_on_the_weights_is_added_once():
    def penalty(model):
        return sum(p.square().sum() for n, p in model.named_parameters() if "lora_A" in n)

    plain, with_penalty = (
        Stepper("NPO", NLL, {"SAM": {}}, penalty=given, layout=(4, 4)).run()
        for given in (None, penalty)
    )
    value = float(penalty(Stepper("NPO", NLL).model).detach())
    assert with_penalty.log[0]["loss"] == pytest.approx(plain.log[0]["loss"] + value, rel=1e-6)
    for (name, p), one, other in zip(
        with_penalty.context.trained.items(), plain.gradients[0], with_penalty.gradients[0],
        strict=True,
    ):  # fmt: skip
        start = p + with_penalty.learning_rate * other
        expected = one + 2 * start if "lora_A" in name else one
        torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-4)
