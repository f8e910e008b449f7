"""Compute forget quality, which sums up TOFU. arXiv:2401.06121, section 2.2."""

import numpy as np
from scipy.stats import ks_2samp

from unlora.evals.metrics import metric
from unlora.evals.records import Reference
from unlora.results.value import Value


@metric("forget_quality", higher_is_better=True)
def forget_quality(truth_ratio: Value, retain: Reference) -> Value:
    """p-value of a two-sample Kolmogorov-Smirnov test on truth ratios, against the retain model.

    Range 0..1; 1 when the two models cannot be told apart. NaN with no example on one side.
    """
    _, p = _ks(truth_ratio, retain)
    return Value(p, unscored=_unscored(truth_ratio))


@metric("forget_quality_log10", higher_is_better=True)
def forget_quality_log10(truth_ratio: Value, retain: Reference) -> Value:
    """log10 of :func:`forget_quality`, 0 at best; at least -323, the smallest float."""
    _, p = _ks(truth_ratio, retain)
    return Value(float(np.log10(np.maximum(p, 5e-324))), unscored=_unscored(truth_ratio))


@metric("forget_quality_ks", higher_is_better=False)
def forget_quality_ks(truth_ratio: Value, retain: Reference) -> Value:
    """The Kolmogorov-Smirnov statistic itself: 0..1, 0 at best, the same for any number of rows."""
    statistic, _ = _ks(truth_ratio, retain)
    return Value(statistic, unscored=_unscored(truth_ratio))


def _ks(unlearned: Value, retain: Value) -> tuple[float, float]:
    """Statistic and p-value, over the examples that could be scored."""
    ratios = [value.column("score") for value in (unlearned, retain)]
    ratios = [column[np.isfinite(column)] for column in ratios]
    if not all(len(column) for column in ratios):
        return float("nan"), float("nan")
    test = ks_2samp(*ratios)
    return float(test.statistic), float(test.pvalue)


def _unscored(ratios: Value) -> int:
    return int((~np.isfinite(ratios.column("score"))).sum())
