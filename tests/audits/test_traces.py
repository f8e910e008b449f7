"""Rows that can be recognised, against a band that is counted out."""

import numpy as np
import pytest

from unlora.audits.membership import membership
from unlora.audits.traces import recognisable
from unlora.evals.metrics.mia import mia_loss, mia_min_k, mia_min_k_plus_plus
from unlora.evals.records import Scored
from unlora.results.value import interval_of_mean

ZEROS = np.zeros(200)


def scored(generator, shift):
    logp = generator.normal(shift, 1, 6) - 3
    return Scored(logp, logp > -1, logp - 1, np.ones(6), "text", False)


def test_membership_is_that_of_the_metrics():
    generator = np.random.default_rng(0)
    forget, holdout = ([scored(generator, shift) for _ in range(9)] for shift in (1, 0))
    found = membership(forget, holdout)
    for name, metric in {
        "loss": mia_loss,
        "min_k": mia_min_k,
        "min_k_plus_plus": mia_min_k_plus_plus,
    }.items():
        assert found.pop(name) == metric(forget, holdout)
    assert not found


def test_a_row_outside_the_central_rows_of_the_holdout_is_recognised_on_both_sides():
    holdout = np.arange(1.0, 200)  # the band leaves 5 of 199 out on each side: 5 to 195
    forget = np.array([4.9, 5.1, 100, 194.9, 195.1, np.nan, -1e9])
    found = recognisable(forget + 7, np.full(7, 7.0), holdout - 3, np.full(199, -3.0))
    outside = [row["outside"] for row in found.per_example]
    assert outside == pytest.approx([1, 0, 0, 0, 1, np.nan, 1], nan_ok=True)
    assert found.value == 3 / 6 and found.unscored == 1
    assert found.interval == interval_of_mean(np.array([1.0, 0, 0, 0, 1, 1]))


def test_it_is_the_difference_to_the_retain_model_that_counts():
    generator = np.random.default_rng(0)
    hard = generator.normal(-5, 3, 200)  # how unlikely a row is for any model
    holdout = hard + generator.normal(0, 0.1, 200)
    like = recognisable(hard + generator.normal(0, 0.1, 200), hard, holdout, hard)
    unlike = recognisable(hard - 1, hard, holdout, hard)
    assert like.value < 0.15 and unlike.value == 1


@pytest.mark.parametrize("rows", [40, 400])
def test_by_chance_it_is_a_row_in_twenty_however_many_holdout_rows_there_are(rows):
    generator = np.random.default_rng(1)
    shares = []
    for _ in range(300):
        forget, holdout = generator.normal(size=(2, rows))
        low, high = np.quantile(holdout, (0.025, 0.975), method="weibull")
        shares.append(np.mean((forget < low) | (forget > high)))
    assert np.mean(shares) == pytest.approx(0.05, abs=0.01)
    assert recognisable(forget, 0 * forget, holdout, 0 * holdout).value == shares[-1]


def test_without_holdout_rows_there_is_no_band():
    for holdout in (np.array([]), np.array([1.0, np.nan])):
        found = recognisable(ZEROS, ZEROS, holdout, holdout)
        assert np.isnan(found.value) and "holdout rows have a log-prob" in found.not_computed
