"""Which scale does what is asked for."""

import pytest

from unlora.audits.scale_search import LARGEST, STEPS, largest_scale, least_scale, rounded

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
