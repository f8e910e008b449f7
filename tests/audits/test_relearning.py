"""A short training against one written out: loss, batches and AdamW by hand, in float64."""

import copy

import numpy as np
import pytest
import tiny
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from unlora.audits.attack import ATTACKS, ShortTraining, TrainingData
from unlora.audits.attacks.relearn import relearn
from unlora.audits.relearning import Relearning
from unlora.data.encoded import Encoded
from unlora.errors import InputError

ROWS = tiny.rows([3, 1, 5, 2, 4])
RATE, BETAS, EPS = 1e-2, (0.9, 0.999), 1e-8


def plan(**changes):
    settings = {"rank": 2, "batch_size": 2, "seed": 3} | changes
    return ShortTraining("forget", tuple(range(5)), RATE, (1, 4), **settings)


def mean_loss(model, rows):
    losses = []
    for row in rows:
        logps = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        losses += [
            -logps[t - 1, label] for t, label in enumerate(row.labels) if label != -100 and t
        ]
    return torch.stack(losses).mean()


def trained_literally(model, rows, steps, *, size=2, seed=3):
    """AdamW without decay, on batches cut from one shuffled epoch after another."""
    generator = np.random.default_rng(seed)
    order = [n for _ in range(steps) for n in generator.permutation(len(rows)).tolist()]
    weights = [p for p in model.parameters() if p.requires_grad]
    first, second = ([torch.zeros_like(p) for p in weights] for _ in range(2))
    for step in range(1, steps + 1):
        batch = [rows[n] for n in order[(step - 1) * size : step * size]]
        gradients = torch.autograd.grad(mean_loss(model, batch), weights)
        for p, gradient, m, v in zip(weights, gradients, first, second, strict=True):
            m.mul_(BETAS[0]).add_((1 - BETAS[0]) * gradient)
            v.mul_(BETAS[1]).add_((1 - BETAS[1]) * gradient.square())
            corrected = m / (1 - BETAS[0] ** step)
            size_of_step = (v / (1 - BETAS[1] ** step)).sqrt() + EPS
            p.data -= RATE * corrected / size_of_step
    return model


def adapter(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_the_adapter_is_that_of_a_training_written_out():
    training = Relearning(tiny.llama().double(), ROWS, plan(), pad_id=0)
    start = copy.deepcopy(training.at(0))
    assert start.peft_config["default"].lora_alpha == 4 and not start.training
    layers = {name.split(".lora_")[0] for name in adapter(start)}
    assert len(layers) == 14 and not any("lm_head" in name for name in layers)
    for steps in (1, 4):
        expected = adapter(trained_literally(copy.deepcopy(start), ROWS, steps))
        found = adapter(training.at(steps))
        assert len(found) == 28
        for name, weight in found.items():
            assert torch.allclose(weight, expected[name], rtol=0, atol=1e-10), (steps, name)
    assert all(p.grad is None for p in training.network.parameters())


def test_going_on_gives_what_going_at_once_gives_whatever_is_asked_between():
    one, other = (Relearning(tiny.llama(), ROWS, plan(), pad_id=0) for _ in range(2))
    one.at(2)(torch.tensor([ROWS[0].input_ids]))
    found, expected = adapter(one.at(4)), adapter(other.at(4))
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())
    with pytest.raises(ValueError, match="step 3 has passed: the training is at step 4"):
        one.at(3)


def test_the_seed_alone_draws_and_the_random_state_of_the_process_stays():
    torch.manual_seed(1), np.random.seed(1)
    state, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = adapter(Relearning(tiny_copy(), ROWS, plan(), pad_id=0).at(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numbers)
    torch.manual_seed(2)
    second = adapter(Relearning(tiny_copy(), ROWS, plan(), pad_id=0).at(2))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    other = adapter(Relearning(tiny_copy(), ROWS, plan(seed=4), pad_id=0).at(2))
    assert not torch.equal(*(next(iter(weights.values())) for weights in (first, other)))


MODEL = tiny.llama()


def tiny_copy():
    return copy.deepcopy(MODEL)


def test_it_learns_under_no_grad_too_and_dropout_is_off():
    torch.manual_seed(0)
    shape = {"vocab_size": tiny.VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0.5)).requires_grad_(False)
    with torch.no_grad():
        before = float(mean_loss(model.eval(), ROWS))
        training = Relearning(model, ROWS, plan(batch_size=100), pad_id=0)  # more than there are
        after = float(mean_loss(training.at(10), ROWS))
    assert after < before - 0.1


def test_rows_without_an_answer_are_left_out():
    nothing = Encoded([1, 2, 3], [-100] * 3)
    training = Relearning(tiny_copy(), [nothing, ROWS[0]], plan(), pad_id=0)
    assert training.rows == [ROWS[0]]
    with pytest.raises(InputError, match="No row to train on has an answer"):
        Relearning(tiny_copy(), [nothing], plan(), pad_id=0)


def test_some_forget_rows_are_drawn_and_the_others_left_to_be_scored():
    plans = relearn(TrainingData(forget=200, retain=0))
    assert [one.learning_rate for one in plans] == [2e-5, 2e-4, 1e-3]
    first = plans[0]
    assert (first.data, first.steps, first.rank, first.batch_size) == ("forget", (5, 20, 60), 16, 8)
    assert len(set(first.rows)) == 20 and set(first.rows) <= set(range(200))
    assert all(one.rows == first.rows for one in plans)
    assert relearn(TrainingData(200, 0), seed=1)[0].rows != first.rows
    for total, settings, expected in [
        (30, {}, 8), (5000, {}, 64), (16, {}, 8), (43, {"share": 0.5}, 21),
        (100, {"share": 0.29}, 29),
    ]:  # fmt: skip
        assert len(relearn(TrainingData(total, 0), **settings)[0].rows) == expected


def test_retain_rows_are_drawn_up_to_the_most():
    plans = relearn(TrainingData(forget=3, retain=100), trains_on="retain", learning_rates=(1e-4,))
    assert len(plans) == 1 and plans[0].data == "retain" and len(set(plans[0].rows)) == 64
    assert relearn(TrainingData(3, 9), trains_on="retain")[0].rows == tuple(range(9))


@pytest.mark.parametrize(
    "data, settings, wrong",
    [
        (TrainingData(15, 0), {}, "train on 8 of 15 forget rows and score the others, which must"),
        (TrainingData(100, 0), {"share": 0.6}, "train on 60 of 100 forget rows"),
        (TrainingData(8, 0), {}, "train on 8 of 8"),
        (TrainingData(100, 0), {"trains_on": "retain"}, "no retain rows"),
    ],
)
def test_too_few_rows_are_refused(data, settings, wrong):
    with pytest.raises(InputError, match=wrong):
        relearn(data, **settings)


@pytest.mark.parametrize(
    "given, wrong",
    [
        (
            {"trains_on": "holdout"},
            "Unknown trains_on of attack relearn 'holdout'. .*Known: forget, retain",
        ),
        ({"share": 1.5}, "share of attack relearn is 1.5; it must be 0 or more and 1 or less"),
        ({"steps": [20, 5]}, r"steps of attack relearn is \[20, 5\]; they must rise"),
        ({"steps": []}, "they must rise"),
        ({"learning_rates": [0.0]}, "all must be above 0"),
        ({"learning_rates": ["fast"]}, "it must be a list such as"),
    ],
)
def test_its_settings_are_checked_before_a_model_is_asked(given, wrong):
    assert ATTACKS["relearn"].configured({})["steps"] == (5, 20, 60)
    with pytest.raises(InputError, match=wrong):
        ATTACKS["relearn"].configured(given)
