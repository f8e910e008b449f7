"""The figures that sum up an evaluation, and the label of a broken model, from values by hand."""

import math

import pytest

from unlora.evals.metrics.aggregates import (
    agg,
    agg_memorization,
    agg_privacy,
    agg_utility,
    collapsed,
    model_utility,
)
from unlora.results.value import Value

NAN = math.nan


def values(*numbers):
    return [Value(number) for number in numbers]


@pytest.mark.parametrize("metric", [model_utility, agg_privacy, agg])
def test_a_harmonic_mean_is_zero_with_a_zero_and_nan_with_a_nan(metric):
    assert metric(values(0.5, 1.0)).value == pytest.approx(2 / 3)
    assert metric(values(0.0, 1.0)).value == 0
    assert metric(values(0.4, 0.4, 0.4)).value == pytest.approx(0.4)
    assert math.isnan(metric(values(NAN, 1.0)).value)
    assert math.isnan(metric(values(NAN, 0.0)).value)
    assert math.isnan(metric([]).value)
    assert metric([Value(NAN, unscored=2), Value(1.0, unscored=1)]).unscored == 2
    assert metric([Value(0.5, unscored=2)]).unscored == 0  # the part itself says so


def test_memorization_is_high_where_little_is_left():
    # 4 / (1/0.9 + 1/0.5 + 1/0.8 + 1/0.4)
    expected = 4 / (1 / 0.9 + 1 / 0.5 + 1 / 0.8 + 1 / 0.4)
    assert agg_memorization(*values(0.1, 0.5, 0.2, 0.6)).value == pytest.approx(expected)
    assert agg_memorization(*values(0, 0, 0, 0)).value == 1
    assert agg_memorization(*values(0.1, 1.0, 0.2, 0.6)).value == 0
    # a probability may be rounded to a hair above 1
    assert agg_memorization(*values(0.1, 0.5, 1 + 1e-7, 0.6)).value == 0
    assert math.isnan(agg_memorization(*values(0.1, NAN, 0.2, 0.6)).value)


def test_utility_is_a_share_of_what_the_model_had_before():
    # HM(0.4, 0.8) = 0.5333, HM(0.6, 0.9) = 0.72
    found = agg_utility(*values(0.4, 0.8, 0.6, 0.9)).value
    assert found == pytest.approx((2 / (1 / 0.4 + 1 / 0.8)) / (2 / (1 / 0.6 + 1 / 0.9)))
    assert agg_utility(*values(0.6, 0.9, 0.6, 0.9)).value == pytest.approx(1)
    assert agg_utility(*values(0.0, 0.9, 0.6, 0.9)).value == 0
    assert math.isnan(agg_utility(*values(0.4, 0.8, 0.0, 0.9)).value)
    assert math.isnan(agg_utility(*values(NAN, 0.8, 0.6, 0.9)).value)


@pytest.mark.parametrize(
    "utility, repetition, target, note",
    [
        (0.4, 0.1, 0.6, None),
        (0.3, 0.5, 0.6, None),  # on the thresholds
        (0.29, 0.1, 0.6, "utility 0.29 is below 0.5 of the target's 0.6"),
        (0.11, 0.1, None, None),
        (0.05, 0.1, None, "utility 0.05 is below 0.1"),
        (0.4, 0.9, 0.6, "repetition 0.9 is above 0.5"),
        (0.05, 0.9, 0.6, "utility 0.05 is below 0.5 of the target's 0.6; "
                         "repetition 0.9 is above 0.5"),
        (0.4, NAN, 0.6, None),  # answers of one or two words cannot repeat any
        (0.05, 0.1, NAN, "utility 0.05 is below 0.1"),
        (0.11, 0.1, NAN, None),  # the target's log has no utility: the floor holds
        (NAN, 0.9, 0.6, "repetition 0.9 is above 0.5"),
    ],
)  # fmt: skip
def test_a_broken_model_is_collapsed_and_the_note_says_why(utility, repetition, target, note):
    before = None if target is None else Value(target)
    found = collapsed(Value(utility), Value(repetition), before)
    assert (found.value, found.note) == (float(note is not None), note)


def test_the_thresholds_of_collapse_are_settings():
    good = Value(0.5), Value(0.3), Value(0.6)
    assert collapsed(*good).value == 0
    assert collapsed(*good, utility_share=0.9).value == 1
    assert collapsed(*good, max_repetition=0.2).value == 1
    assert collapsed(*good[:2], None, utility_floor=0.6).value == 1


def test_a_model_without_finite_logits_is_collapsed_and_no_rows_are_no_collapse():
    dead = collapsed(Value(NAN, unscored=7), Value(NAN, unscored=7), Value(0.6))
    assert dead.value == 1 and "7 rows" in dead.note
    assert math.isnan(collapsed(Value(NAN), Value(NAN), None).value)


@pytest.mark.parametrize(
    "utility, target, value",
    [
        (0.04, None, None),  # nothing to compare with
        (0.04, 0.0, None),  # the target had none to lose
        (0.04, NAN, None),
        (0.04, 0.1, 1),
        (0.06, 0.1, 0),
    ],
)  # fmt: skip
def test_on_own_data_only_the_target_tells_whether_a_model_collapsed(utility, target, value):
    before = None if target is None else Value(target)
    found = collapsed(Value(utility), Value(0.0), before, utility_floor=0.0)
    if value is None:
        assert found.not_computed.startswith("not known: ") and math.isnan(found.value)
    else:
        assert found.value == value and not found.not_computed
    assert collapsed(Value(utility), Value(0.9), before, utility_floor=0.0).value == 1
