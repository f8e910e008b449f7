"""Which scale does what is asked for."""

import pytest

from unlora.audits.scale_search import (
    FARTHER,
    LARGEST,
    SCALES,
    STEPS,
    largest_on_curve,
    largest_scale,
    least_on_curve,
    least_scale,
    rounded,
)
from unlora.recipes.dial_run import Dial

FINE = LARGEST / 2**STEPS


@pytest.mark.parametrize("least", [0.01, 0.3, 0.784, 1.0, 1.2])
def test_the_least_scale_is_found_as_finely_as_promised(least):
    found = least_scale(lambda scale: scale >= least)
    assert least <= found <= least + FINE


def test_no_scale_is_none():
    assert least_scale(lambda scale: False) is None
    assert largest_scale(lambda scale: False) is None


@pytest.mark.parametrize("most", [0.0, 0.3, 0.784, 1.0])
def test_the_largest_scale_is_found_as_finely_as_promised(most):
    found = largest_scale(lambda scale: scale <= most)
    assert most - FINE <= found <= most
    assert largest_scale(lambda scale: True) == LARGEST


@pytest.mark.parametrize("scale, name", [(0.78125, 0.79), (0.78, 0.78), (1.25, 1.25)])
def test_a_scale_is_rounded_towards_more_forgetting(scale, name):
    assert rounded(scale) == name


@pytest.mark.parametrize("verdict, scale", [
    ("held", 0.64), ("cannot be told", 0.64), ("too few to say", 0.64), ("over-forgotten", None),
])  # fmt: skip
def test_a_scale_within_the_bounds_is_named_also_where_rows_are_too_few_for_a_verdict(
    monkeypatch, verdict, scale
):
    dial = object.__new__(Dial)
    monkeypatch.setattr(Dial, "_least_held", lambda self: 0.64)
    monkeypatch.setattr(Dial, "audit", lambda self, scale: {"verdict": {"name": verdict}})
    assert dial.search("audit") == (scale, {"name": verdict})


@pytest.mark.parametrize("border", [0.01, 0.25, 0.3, 0.784, 1.0, 1.2])
def test_between_the_scales_of_the_curve_four_more_are_asked_about(border):
    asked = set()

    def at_least(scale):
        asked.add(scale)
        return scale >= border

    least = least_on_curve(at_least)
    assert border <= least <= border + FINE and len(asked - {*SCALES}) == 4
    largest = largest_on_curve(lambda scale: scale <= border)
    assert border - FINE <= largest <= border


@pytest.mark.parametrize("border", [1.26, 1.5, 1.9, 2.3, 3.0])
def test_beyond_the_curve_scales_are_tried_in_turn_as_finely(border):
    asked = []

    def at_least(scale):
        asked.append(scale)
        return scale >= border

    least = least_on_curve(at_least, FARTHER)
    assert border <= least <= border + FINE
    assert max(asked) == next(scale for scale in FARTHER if scale >= border)
    assert least_on_curve(lambda scale: scale >= border) is None


def test_beyond_the_curve_nothing_is_asked_where_the_curve_is_enough():
    asked = set()
    least_on_curve(lambda scale: asked.add(scale) or scale >= 1.2, FARTHER)
    assert max(asked) == LARGEST
    assert least_on_curve(lambda scale: False, FARTHER) is None


def test_a_scale_that_is_enough_is_taken_though_a_larger_one_is_not():
    asked = set()
    least = least_on_curve(lambda scale: asked.add(scale) or 0.6 <= scale < 1.2, FARTHER)
    assert 0.6 <= least <= 0.6 + FINE and max(asked) == LARGEST


def test_where_the_whole_curve_is_on_one_side_its_end_is_taken_or_nothing():
    assert least_on_curve(lambda scale: False) is None
    assert largest_on_curve(lambda scale: False) is None
    assert largest_on_curve(lambda scale: True) == LARGEST
    assert least_on_curve(lambda scale: True) <= FINE
