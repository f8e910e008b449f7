"""Sum up a whole evaluation in one figure, and label a broken model.

The aggregates are those of OpenUnlearning's report, arXiv:2506.12618.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from scipy.stats import hmean

from unlora.evals.metrics import metric
from unlora.evals.metrics.derived import derived
from unlora.evals.records import Target
from unlora.results.collapse import CollapseRule
from unlora.results.value import Value


@metric("model_utility", higher_is_better=True)
def model_utility(parts: list[Value]) -> Value:
    """Harmonic mean of its parts, nine in TOFU. Range 0..1; NaN when a part is NaN.

    TOFU, arXiv:2401.06121, section 2.2.
    """
    return _harmonic(parts)


@metric("agg_memorization", higher_is_better=True)
def agg_memorization(
    extraction_strength: Value,
    exact_memorization: Value,
    paraphrase_probability: Value,
    truth_ratio: Value,
) -> Value:
    """Mem: how little is remembered, the harmonic mean of one minus each of four figures.

    Range 0..1. ``truth_ratio`` is the one with ``aggregator: prob_mean``, high where the model
    remembers. NaN when a part is NaN.
    """
    parts = (extraction_strength, exact_memorization, paraphrase_probability, truth_ratio)
    return _harmonic(replace(part, value=1 - part.value) for part in parts)


@metric("agg_privacy", higher_is_better=True)
def agg_privacy(attacks: list[Value]) -> Value:
    """Priv: harmonic mean of s_MIA (``privleak_bounded``) of several membership attacks.

    Range 0..1; the report has loss, zlib, min-k and min-k++. NaN when a part is NaN.
    """
    return _harmonic(attacks)


@metric("agg_utility", higher_is_better=True)
def agg_utility(
    utility: Value, fluency: Value, target_utility: Target, target_fluency: Target
) -> Value:
    """Utility: harmonic mean of utility and fluency, over that of the model before unlearning.

    0 and up; 1 where nothing was lost. NaN when a part is NaN, or when the target has none.
    """
    now, before = _harmonic((utility, fluency)), _harmonic((target_utility, target_fluency))
    ratio = now.value / before.value if before.value > 0 else float("nan")
    return derived(ratio, utility, fluency)


@metric("agg", higher_is_better=True)
def agg(parts: list[Value]) -> Value:
    """Agg: harmonic mean of Mem, Priv and Utility. NaN when a part is NaN."""
    return _harmonic(parts)


@metric("collapsed", higher_is_better=False)
def collapsed(
    utility: Value,
    repetition: Value,
    target: Target | None,
    *,
    utility_share: float = 0.5,
    utility_floor: float = 0.1,
    max_repetition: float = 0.5,
) -> Value:
    """1 for a model that is broken, which must not pass for one that has forgotten; else 0.

    ``note`` says by which threshold. A model whose logits are not finite is broken, too. NaN when
    there are no rows to tell by, not computed where only the target could tell and is not there.

    Args:
        utility_share: collapsed below this share of the target's utility.
        utility_floor: collapsed below this utility, where there is no log of the target, or the
            target is below it itself; 0: only the target tells what a sound model reaches.
        max_repetition: collapsed above this :func:`repetition`.
    """
    verdict = CollapseRule(utility_share, utility_floor, max_repetition).judge(
        utility.value,
        repetition.value,
        target.value if target is not None else None,
        utility.unscored,
    )
    if verdict.unknown:
        nothing = np.isnan(utility.value)
        return Value(float("nan")) if nothing else Value.missing(f"not known: {verdict.unknown}")
    return Value(float(bool(verdict.reasons)), note="; ".join(verdict.reasons) or None)


def _harmonic(parts: Iterable[Value]) -> Value:
    """Harmonic mean; 0 when a part is 0, NaN when one is NaN or there are none."""
    parts = list(parts)
    # rounding may leave 1 - p a hair below 0
    values = np.maximum([part.value for part in parts], 0)
    finite = len(values) and np.isfinite(values).all()
    return derived(float(hmean(values)) if finite else float("nan"), *parts)
