"""Tell whether a generation still is text, whatever it says."""

from collections.abc import Sequence

import numpy as np

from unlora.evals.metrics import metric
from unlora.evals.metrics.rouge import WORD
from unlora.evals.records import Generated, Legible, Reread, RootScored
from unlora.results.value import Value

WORDS_IN_A_ROW = 4


@metric("repetition", higher_is_better=False)
def repetition(answers: list[Generated]) -> Value:
    """Share of the runs of four words that were written before. Welleck et al. 2020, seq-rep-4.

    arXiv:1908.04319: 1 - distinct / all. Range 0..1. A text of fewer than four words
    cannot repeat one and is NaN, and so is that of a model with logits that are not finite.
    """
    rows = [{"score": _repeated(answer.text)} for answer in answers]
    return Value.mean(rows, "score")


@metric("fluency", higher_is_better=True)
def fluency(answers: Reread, truth: RootScored) -> Value:
    """Likelihood of what was written under the root model, beside that of true answers; at most 1.

    Of each row min(1, exp(mean loss of the true answers - loss of what was written)), losses per
    token but the end token, which a text cut at ``max_new_tokens`` lacks. Range 0..1: 1 where a
    text is no less likely than true answers are. Nothing written counts 0, since it says nothing.
    NaN where the root gives no finite loss, where the model itself had no finite logits (None), and
    where no true answer is scored.
    """
    expected = np.array([answer.without_end().loss for answer in truth])
    expected = expected[np.isfinite(expected)]
    usual = float(expected.mean()) if len(expected) else float("nan")
    rows = []
    for answer in answers:
        loss = float("nan") if answer is None else answer.without_end().loss
        silent = answer is not None and not len(answer.logp) and not answer.text.strip()
        gap = float("-inf") if silent else np.minimum(0, usual - loss)
        rows.append({"score": float(np.exp(gap)), "avg_loss": loss})
    return Value.mean(rows, "score")


@metric("gibberish", higher_is_better=True)
def gibberish(answers: Legible) -> Value:
    """Probability of clean text under a classifier of gibberish; mean over what was written.

    Range 0..1; high is good, as in OpenUnlearning's ``forget_Q_A_gibberish``. NaN where there is
    nothing to judge.
    """
    return Value.mean([{"score": float(clean)} for clean in answers], "score")


def _repeated(text: str | None) -> float:
    words = WORD.findall((text or "").lower())
    runs = _runs(words)
    return 1 - len(set(runs)) / len(runs) if runs else float("nan")


def _runs(words: Sequence[str]) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(WORDS_IN_A_ROW)), strict=False))
