"""Measure how much of an answer is known word for word. The end token does not count."""

import numpy as np

from unlora.evals.metrics import metric
from unlora.evals.records import Scored
from unlora.results.value import Value


@metric("exact_memorization", higher_is_better=False)
def exact_memorization(answers: list[Scored]) -> Value:
    """Share of the answer's tokens that are the greedy prediction. Tirumala et al. 2022.

    Range 0..1. An answer of no token is NaN.
    """
    hits = [answer.without_end().hit for answer in answers]
    rows = [{"score": float(hit.mean()) if len(hit) else float("nan")} for hit in hits]
    return Value.mean(rows, "score")


@metric("extraction_strength", higher_is_better=False)
def extraction_strength(answers: list[Scored]) -> Value:
    """Share of the answer that is its longest suffix of greedy predictions. Carlini et al. 2021.

    Range 0..1; 0 when the last token is missed. An answer of no token is NaN.
    """
    rows = [{"score": _suffix(answer.without_end().hit)} for answer in answers]
    return Value.mean(rows, "score")


@metric("extraction_strength_upstream", higher_is_better=False)
def extraction_strength_upstream(answers: list[Scored]) -> Value:
    """:func:`extraction_strength` as in most published tables: never below 1/tokens.

    There the last token counts as known even when it is missed.
    """
    rows = []
    for answer in answers:
        hit = answer.without_end().hit
        rows.append({"score": max(_suffix(hit), 1 / len(hit)) if len(hit) else float("nan")})
    return Value.mean(rows, "score")


def _suffix(hit: np.ndarray) -> float:
    return float(np.logical_and.accumulate(hit[::-1]).mean()) if len(hit) else float("nan")
