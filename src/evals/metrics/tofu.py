"""The two figures that sum up TOFU. arXiv:2401.06121, section 2.2."""

import numpy as np
from scipy.stats import hmean, ks_2samp

from unlora.evals.metrics import metric
from unlora.evals.records import Reference, Value


@metric("forget_quality", higher_is_better=True)
def forget_quality(truth_ratio: Value, retain: Reference) -> Value:
    """p-value of a two-sample Kolmogorov-Smirnov test on truth ratios, against the retain model.

    Range 0..1; 1 when the two models cannot be told apart. NaN with no example on one side.
    """
    return Value(_ks(truth_ratio, retain)[1])


@metric("forget_quality_log10", higher_is_better=True)
def forget_quality_log10(truth_ratio: Value, retain: Reference) -> Value:
    """log10 of :func:`forget_quality`, 0 at best; at least -323, the smallest float."""
    return Value(float(np.log10(np.maximum(_ks(truth_ratio, retain)[1], 5e-324))))


@metric("forget_quality_ks", higher_is_better=False)
def forget_quality_ks(truth_ratio: Value, retain: Reference) -> Value:
    """The Kolmogorov-Smirnov statistic itself: 0..1, 0 at best, the same for any number of rows."""
    return Value(_ks(truth_ratio, retain)[0])


@metric("model_utility", higher_is_better=True)
def model_utility(parts: list[Value]) -> Value:
    """Harmonic mean of its parts, nine in TOFU. Range 0..1; NaN when a part is NaN."""
    values = [part.value for part in parts]
    return Value(float(hmean(values)) if np.isfinite(values).all() else float("nan"))


def _ks(unlearned: Value, retain: Value) -> tuple[float, float]:
    """Statistic and p-value, over the examples that could be scored."""
    ratios = [value.column("score") for value in (unlearned, retain)]
    ratios = [column[np.isfinite(column)] for column in ratios]
    if not all(len(column) for column in ratios):
        return float("nan"), float("nan")
    found = ks_2samp(*ratios)
    return float(found.statistic), float(found.pvalue)
