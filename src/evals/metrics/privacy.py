"""Compare a figure with that of the retain model, which never saw the forget data."""

import numpy as np

from unlora.evals.metrics import metric
from unlora.evals.metrics.derived import derived
from unlora.evals.records import Reference
from unlora.results.value import Value

TINY = 1e-10  # added to denominators by the published evaluation code; kept for equal numbers


@metric("privleak", higher_is_better=None)
def privleak(attack: Value, retain: Reference) -> Value:
    """Distance of a membership AUC from the retain model's, in percent. MUSE, arXiv:2407.06460.

    0 is ideal, -100 means nothing was forgotten, above 0 that the forget data stand out the other
    way round. With A = 1 - AUC as the paper has it: 100 (A - A_retain) / A_retain. NaN where
    either AUC is.
    """
    unlearned, retrained = 1 - attack.value, 1 - retain.value
    return derived(100 * (unlearned - retrained) / (retrained + TINY), attack)


@metric("privleak_bounded", higher_is_better=True)
def privleak_bounded(attack: Value, retain: Reference) -> Value:
    """Closeness of a membership AUC to the retain model's: 1 - |AUC - AUC_retain| / AUC_retain.

    Range 0..1, 1 is ideal; what falls below is 0, and NaN where either AUC is. Unlike
    :func:`privleak` it does not explode as the retain model's AUC comes near 1. It is s_MIA of
    OpenUnlearning's report, arXiv:2506.12618.
    """
    distance = abs(attack.value - retain.value) / max(retain.value, TINY)
    return derived(float(np.clip(1 - distance, 0, 1)), attack)


@metric("rel_diff", higher_is_better=None)
def rel_diff(forget: Value, retain: Reference) -> Value:
    """Relative difference of any figure to the retain model's, in percent; 0 is ideal.

    100 (v - v_retain) / v_retain; NaN where either is.
    """
    return derived(100 * (forget.value - retain.value) / (retain.value + TINY), forget)
