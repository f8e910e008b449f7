"""Find how far an unlearning adapter should be turned: the scale that does what was asked for.

What a model forgets rises with the scale of its unlearning adapter, and what it still can falls. A
scale is found by bisection; a function of the scale that is asked for again is asked once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LARGEST = 1.25
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, LARGEST)
STEPS = 6  # of a bisection: 1.25 / 2 ** 6 is 0.02


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
