"""Which verdict comes of which figures."""

from dataclasses import replace

import numpy as np
import pytest

from unlora.audits.residual import VAGUE, Held, Residual
from unlora.audits.verdict import Thresholds, judge
from unlora.results.value import Value

NAN = float("nan")


def plain(value, low=None, high=None, *, tells=True, rows=60):
    bounds = (value - 0.05 if low is None else low, value + 0.05 if high is None else high)
    return Residual(
        "plain", "plain", value, bounds, None if tells else "alike", True, rows, (NAN,) * 3
    )


def held(value, high):
    return Held(value, (value - 0.05, high), "relearn: step 20", 9)


CASES = {
    "broken": (plain(0.9), held(0.9, 1.0), ["utility is gone"], None),
    "known": (plain(0.11), held(0.2, 0.3), [], None),
    "hidden": (plain(0.0), held(0.15, 0.21), [], None),
    "over-forgotten": (plain(-0.3), held(0.1, 0.15), [], None),
    "held": (plain(0.0), held(0.08, 0.14), [], None),
    "too few to say": (plain(0.9, rows=19), held(0.9, 1.0), [], None),
    "cannot be told": (plain(NAN, tells=False), None, [], None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_first_that_fits_is_the_verdict(name):
    assert judge(*CASES[name], Thresholds()).name == name


def test_rows_that_can_be_recognised_are_a_trace():
    many, few = Value(0.5, interval=(0.3, 0.7)), Value(0.3, interval=(0.2, 0.4))
    assert judge(plain(0.0), held(0.1, 0.1), [], many, Thresholds()).name == "over-forgotten"
    assert judge(plain(0.0), held(0.1, 0.1), [], few, Thresholds()).name == "held"


def test_the_sentence_can_be_defended():
    said = judge(plain(0.0), held(0.08, 0.14), [], None, Thresholds()).sentence
    assert said == (
        "Under the worst of 9 attacks (relearn: step 20) 8 % [3, 14] of what the model knew is "
        "there; a model that never saw the data: 0 %. Held."
    )


def test_it_says_whom_it_is_compared_with():
    root = "the root model without adapters"
    for name in ("known", "hidden", "held", "over-forgotten", "cannot be told"):
        assert root in judge(*CASES[name], Thresholds(), root).sentence, name


def test_rows_that_differ_too_much_are_not_called_never_known():
    vague = replace(plain(0.1, -0.3, 0.5), left_out=VAGUE)
    verdict = judge(vague, held(0.1, 0.15), [], None, Thresholds())
    assert verdict.name == "cannot be told" and "nothing to forget" not in verdict.sentence
    assert "10 % [-30, 50]" in verdict.sentence and VAGUE in verdict.sentence


def test_rows_that_are_needed_are_a_whole_number():
    limits = Thresholds(least_rows=30.0)
    assert "; 30 are needed" in judge(plain(0, rows=20), None, [], None, limits).sentence


def test_thresholds_are_the_users_to_set():
    assert judge(plain(0.0), held(0.15, 0.21), [], None, Thresholds(hidden=0.3)).name == "held"
    assert np.isclose(Thresholds().as_dict()["hidden"], 0.2)


def test_an_attack_that_shows_enough_needs_no_plain_question():
    wide = Residual("plain", "plain", 0.0, (-0.3, 0.2), VAGUE, True, 60, (NAN,) * 3)
    assert judge(wide, held(0.5, 0.6), [], None, Thresholds()).name == "hidden"
    assert judge(wide, held(0.1, 0.15), [], None, Thresholds()).name == "cannot be told"
