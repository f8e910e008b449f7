"""Find how far an unlearning adapter should be turned: the scale that does what was asked for.

What a model forgets rises with the scale of its unlearning adapter, and what it still can falls. A
scale is found by bisection; a function of the scale that is asked for again is asked once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

LARGEST = 1.25
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, LARGEST)
FARTHER = (1.5, 2.0, 3.0)  # asked one by one, and only where none of SCALES is enough
STEPS = 6  # of a bisection: 1.25 / 2 ** 6 is 0.02
FINEST = 0.016  # how near to the least scale a search between two neighbours of SCALES comes


@dataclass(frozen=True)
class Point:
    """What one scale comes to.

    Attributes:
        residual: asked plainly; NaN where target and retain model do not differ.
        retain: probability of the retain answers; None without retain rows.
        holdout: of the holdout answers.
    """

    scale: float
    residual: float
    retain: float | None = None
    holdout: float | None = None


def least_scale(
    enough: Callable[[float], bool], *, low: float = 0.0, high: float = LARGEST, steps: int = STEPS
) -> float | None:
    """The least scale that is enough, of a condition that holds from some scale on.

    Returns:
        A scale at which it holds, at most ``(high - low) / 2 ** steps`` above the least; None where
        it does not hold at ``high``.
    """
    return _bisected(enough, high, low, steps) if enough(high) else None


def largest_scale(
    enough: Callable[[float], bool], *, low: float = 0.0, high: float = LARGEST, steps: int = STEPS
) -> float | None:
    """The largest scale that is still good enough, of a condition that holds up to some scale."""
    if enough(high):
        return high
    return _bisected(enough, low, high, steps) if enough(low) else None


def least_on_curve(enough: Callable[[float], bool], farther: Sequence[float] = ()) -> float | None:
    """:func:`least_scale`, searched between the two of ``SCALES`` that are next to it.

    A model that breaks may know more again: what comes above the last scale that is enough is left.

    Args:
        farther: scales above ``LARGEST``, rising, that are tried in turn where none is enough.
    """
    low, last = LARGEST, max((scale for scale in SCALES if enough(scale)), default=None)
    if last is not None:
        low = max((scale for scale in SCALES if scale < last and not enough(scale)), default=0.0)
        farther = [scale for scale in SCALES if scale > low][:1]
    for high in farther:
        if enough(high):
            return least_scale(enough, low=low, high=high, steps=_steps(low, high))
        low = high
    return None


def largest_on_curve(enough: Callable[[float], bool]) -> float | None:
    """:func:`largest_scale`, searched between the two of ``SCALES`` that are next to it."""
    high = min((scale for scale in SCALES if not enough(scale)), default=LARGEST)
    low = max((scale for scale in SCALES if scale < high), default=high)
    return largest_scale(enough, low=low, high=high, steps=_steps(low, high))


def _steps(low: float, high: float) -> int:
    """Of a bisection that comes as near as ``FINEST``."""
    return math.ceil(math.log2((high - low) / FINEST - 1e-9)) if high > low else 0


def _bisected(enough: Callable[[float], bool], good: float, bad: float, steps: int) -> float:
    """Move a scale that is good enough towards one that is not, as far as it stays so."""
    for _ in range(steps):
        middle = (good + bad) / 2
        if enough(middle):
            good = middle
        else:
            bad = middle
    return good


def rounded(scale: float) -> float:
    """Two decimals, towards more forgetting: a folder is named by it."""
    return float(np.ceil(scale * 100 - 1e-9) / 100)
