"""How much is left, and how sure that is."""

import itertools

import numpy as np
import pytest

from unlora.audits.residual import Comparison, draws_of, held, residual

RNG = np.random.default_rng(0)


def compared(unlearned, target, retain, name="plain", **more):
    arrays = (np.array(scores, dtype=float) for scores in (unlearned, target, retain))
    return Comparison(name, name.split(":")[0], *arrays, **more)


def rows(size=60, left=0.0, noise=0.2, rng=RNG):
    """Scores of a model that has kept the share ``left``."""
    retain = rng.normal(-3, 1, size)
    target = retain + 2 + rng.normal(0, noise, size)
    unlearned = retain + 2 * left + rng.normal(0, noise, size)
    return compared(unlearned, target, retain)


def test_the_residual_is_the_share_of_the_way_from_retain_model_to_target():
    one = compared([-2, -1, -3], [-1, -1, -1], [-3, -4, -5])
    found = residual(one, draws_of(3))
    assert found.value == pytest.approx((1 + 3 + 2) / (2 + 3 + 4))
    assert found.means == pytest.approx((-2, -1, -4))


@pytest.mark.parametrize("who, value", [("target", 1.0), ("retain", 0.0)])
def test_target_and_retain_model_are_the_ends_of_the_scale(who, value):
    one = rows()
    same = compared(getattr(one, who), one.target, one.retain)
    found = residual(same, draws_of(60))
    assert found.value == pytest.approx(value)
    assert found.interval == pytest.approx((value, value))


def test_a_row_without_a_score_has_no_part():
    full, holes = rows(40), np.r_[np.full(5, np.nan), np.zeros(35)]
    found = residual(compared(full.unlearned + holes, full.target, full.retain), draws_of(40))
    rest = compared(full.unlearned[5:], full.target[5:], full.retain[5:])
    assert found.rows == 35
    assert found.value == pytest.approx(residual(rest, draws_of(35)).value)


def test_the_bootstrap_is_that_of_a_loop_over_draws():
    one, draws = rows(12, 0.4), draws_of(12, draws=50)
    literal = []
    for counts in draws:
        chosen = np.repeat(np.arange(12), counts.astype(int))
        u, t, g = (s[chosen] for s in (one.unlearned, one.target, one.retain))
        literal.append((u - g).mean() / (t - g).mean())
    expected = np.percentile(literal, (2.5, 97.5))
    assert residual(one, draws).interval == pytest.approx(tuple(expected))


def test_an_attack_under_which_target_and_retain_model_are_alike_is_left_out():
    strong, taught = rows(60, 0.1), rows(60, 0.9)
    taught = compared(taught.unlearned, taught.retain + RNG.normal(0, 1, 60), taught.retain, "b")
    draws = draws_of(60)
    assert not residual(taught, draws).tells
    largest = held([strong, taught], draws)
    assert (largest.worst, largest.forms) == ("plain", 1)
    assert held([taught], draws) is None


def test_an_attack_that_cannot_tell_a_fifth_from_nothing_is_left_out_unless_it_shows_more():
    vague, clear = rows(20, 0.1, noise=1.5), rows(20, 1.0, noise=1.0)
    draws = draws_of(20)
    assert "wider" in residual(vague, draws).left_out
    low, high = residual(clear, draws).interval
    assert high - low > 0.4 and low > 0.2
    assert residual(clear, draws).tells
    beyond = residual(rows(20, -3.0, noise=1.5), draws)
    assert beyond.tells and beyond.interval[1] < 0 and np.ptp(beyond.interval) > 0.4


def test_held_is_the_largest_and_its_interval_pays_for_the_choice():
    forms = [rows(60, 0.1, noise=0.9) for _ in range(20)]
    draws = draws_of(60)
    values = [residual(one, draws) for one in forms]
    largest = held(forms, draws)
    assert largest.value == max(one.value for one in values)
    best = max(values, key=lambda one: one.value)
    assert largest.interval[0] >= best.interval[0]
    assert largest.interval[1] >= best.interval[1]


def test_what_does_not_count_is_not_in_held():
    weak, strong = rows(60, 0.0), rows(60, 0.9)
    strong = compared(strong.unlearned, strong.target, strong.retain, "scale", counts=False)
    assert held([weak, strong], draws_of(60)).worst == "plain"


@pytest.mark.budget(4)
def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng, inside, draws = np.random.default_rng(1), 0, draws_of(60, draws=400)
    for _ in range(1000):
        found = residual(rows(60, 0.3, noise=1.0, rng=rng), draws)
        inside += found.interval[0] <= 0.3 <= found.interval[1]
    assert 0.93 <= inside / 1000 <= 0.97  # of 1,000: a standard error of 0.7 %


def test_draws_are_those_of_as_many_rows():
    for size, draws in itertools.product((1, 20), (1, 7)):
        found = draws_of(size, draws=draws)
        assert found.shape == (draws, size)
        assert (found.sum(axis=1) == size).all()
