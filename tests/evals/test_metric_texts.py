"""Repetition, fluency, gibberish and the states of the layers, on records made by hand."""

import math

import numpy as np
import pytest

from unlora.evals.metrics.degeneration import fluency, gibberish, repetition
from unlora.evals.metrics.state_similarity import representation_similarity
from unlora.evals.records import Generated, Scored


def wrote(*texts):
    return [Generated("prompt", "reference", text) for text in texts]


def scored(*losses, text="text"):
    logp = -np.array(losses, dtype=np.float64)
    return Scored(logp, logp > -1, 0 * logp, 1 + 0 * logp, text, False)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("one two three four five", 0),
        ("a b c d A b, c d!", 0.2),  # runs abcd bcda cdab dabc abcd: 4 of 5 differ
        ("no no no no no no no no", 0.8),  # 1 of 5
        ("one two three four", 0),
        ("好好好好好好", 2 / 3),  # characters, where a script has no spaces
    ],
)
def test_repetition_is_the_share_of_runs_of_four_words_seen_before(text, expected):
    assert repetition(wrote(text)).value == pytest.approx(expected)


@pytest.mark.parametrize("text", ["one two three", "...", "", None])
def test_a_text_of_fewer_than_four_words_cannot_repeat_one(text):
    value = repetition(wrote(text, "no no no no no"))
    assert value.value == 0.5 and value.unscored == 1
    alone = repetition(wrote(text))
    assert math.isnan(alone.value) and alone.unscored == 1


def test_fluency_compares_with_true_answers_under_the_root_model():
    # true answers lose (1 + 3) / 2 = 2 a token; a text that loses 3 is exp(-1) as likely
    truth = [scored(1), scored(3, 3), scored()]
    value = fluency([scored(3, 3), scored(0.5), scored(2)], truth)
    assert value.column("score") == pytest.approx([math.exp(-1), 1, 1])
    assert value.value == pytest.approx((math.exp(-1) + 2) / 3)
    assert value.unscored == 0 and value.interval[0] < value.value <= value.interval[1]


def test_nothing_written_is_not_fluent():
    value = fluency([scored(text=" "), scored(1)], [scored(1)])
    assert value.column("score").tolist() == [0, 1] and value.unscored == 0


def test_what_no_model_could_judge_is_not_scored():
    # the root's logits were not finite on the first, the model's own on the second
    value = fluency([scored(text="words"), None, scored(1)], [scored(1)])
    assert value.unscored == 2 and value.value == 1
    assert math.isnan(fluency([scored(1)], [scored()]).value)
    assert math.isnan(fluency([], [scored(1)]).value)


def test_gibberish_is_the_mean_probability_of_clean_text():
    value = gibberish([0.25, 0.75, math.nan])
    assert value.value == 0.5 and value.unscored == 1
    assert math.isnan(gibberish([math.nan]).value) and math.isnan(gibberish([]).value)


@pytest.fixture
def states():
    return list(np.random.default_rng(0).normal(size=(30, 3, 8)).astype(np.float32))


def literal_cka(left, right):
    """Kornblith et al. 2019 by features instead of by rows."""
    left, right = left - left.mean(0), right - right.mean(0)
    norm = np.linalg.norm
    return norm(right.T @ left) ** 2 / (norm(left.T @ left) * norm(right.T @ right))


def test_representation_similarity_is_the_mean_over_layers_of_linear_cka(states):
    other = list(np.random.default_rng(1).normal(size=(30, 3, 5)))
    left, right = np.stack(states).astype(np.float64), np.stack(other)
    layers = [literal_cka(left[:, i], right[:, i]) for i in range(3)]
    value = representation_similarity(states, other).value
    assert value == pytest.approx(np.mean(layers)) and 0.05 < value < 0.5


def test_a_rotation_and_a_scale_change_no_representation(states):
    turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(8, 8)))
    assert representation_similarity(states, [3 * row @ turn + 1 for row in states]).value == (
        pytest.approx(1)
    )


def test_states_that_are_not_finite_are_left_out(states):
    broken = [*states[:-1], np.full((3, 8), math.nan)]
    for pair in ((broken, states), (states, broken)):
        value = representation_similarity(*pair)
        assert value.unscored == 1 and value.value == pytest.approx(1)
    assert math.isnan(representation_similarity(states[:1], states[:1]).value)
    assert math.isnan(representation_similarity([], []).value)
    constant = [np.ones((3, 8))] * 30  # a layer that says the same of every row
    assert math.isnan(representation_similarity(constant, states).value)
