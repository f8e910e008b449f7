"""Compute figures from other figures, not from rows."""

import math

from unlora.results.value import Value


def derived(value: float, *parts: Value) -> Value:
    """A figure computed from others.

    Where it is NaN it says how many rows a part could not score, of several parts the most; the
    parts themselves say so where it is not.
    """
    unscored = max((part.unscored for part in parts), default=0)
    return Value(value, unscored=unscored if math.isnan(value) else 0)
