"""Membership inference: does a score tell what was trained on (forget) from what was not (holdout)?

Every score is *low* for members, as a loss is. The value is the area under the ROC curve, the
probability that a forget example scores below a holdout example: 1 when the model plainly
remembers, 0.5 at chance, below 0.5 when forgetting went too far. Examples without a score are NaN
and left out; with no example left on one side the value is NaN.
"""

import zlib
from collections.abc import Callable

import numpy as np
from sklearn.metrics import roc_auc_score

from unlora.evals.metrics import metric
from unlora.evals.records import Reference, Scored, Value


@metric("mia_loss", higher_is_better=False)
def mia_loss(forget: list[Scored], holdout: list[Scored]) -> Value:
    """Mean loss per token. Yeom et al. 2018, arXiv:1709.01604."""
    return _auc(forget, holdout, lambda answer: answer.loss)


@metric("mia_zlib", higher_is_better=False)
def mia_zlib(forget: list[Scored], holdout: list[Scored]) -> Value:
    """Mean loss over the compressed size of the text in bytes. Carlini et al. 2021."""
    return _auc(forget, holdout, lambda a: a.loss / len(zlib.compress(a.text.encode())))


@metric("mia_min_k", higher_is_better=False)
def mia_min_k(forget: list[Scored], holdout: list[Scored], *, k: float = 0.4) -> Value:
    """Mean loss of the share ``k`` of tokens with the lowest probability. arXiv:2310.16789."""
    return _auc(forget, holdout, lambda answer: -_lowest(answer.without_end().logp, k))


@metric("mia_min_k_plus_plus", higher_is_better=False)
def mia_min_k_plus_plus(forget: list[Scored], holdout: list[Scored], *, k: float = 0.4) -> Value:
    """Min-k on log-probabilities standardised over the vocabulary. arXiv:2404.02936."""

    def score(answer: Scored) -> float:
        answer = answer.without_end()
        return -_lowest((answer.logp - answer.mean) / np.sqrt(np.maximum(answer.var, 1e-6)), k)

    return _auc(forget, holdout, score)


@metric("privleak", higher_is_better=None)
def privleak(attack: Value, retain: Reference) -> Value:
    """Distance of a membership AUC from the retain model's, in percent. MUSE, arXiv:2407.06460.

    0 is ideal, -100 means nothing was forgotten, above 0 that the forget data stand out the other
    way round. With A = 1 - AUC as the paper has it: 100 (A - A_retain) / A_retain.
    """
    unlearned, retrained = 1 - attack.value, 1 - retain.value
    return Value(100 * (unlearned - retrained) / (retrained + 1e-10))


@metric("privleak_bounded", higher_is_better=True)
def privleak_bounded(attack: Value, retain: Reference) -> Value:
    """Closeness of a membership AUC to the retain model's: 1 - |AUC - AUC_retain| / AUC_retain.

    Range 0..1, 1 is ideal; what falls below is 0. Unlike :func:`privleak` it does not explode as
    the retain model's AUC comes near 1. It is s_MIA of OpenUnlearning's report.
    """
    distance = abs(attack.value - retain.value) / max(retain.value, 1e-10)
    return Value(float(np.clip(1 - distance, 0, 1)))


def _lowest(scores: np.ndarray, k: float) -> float:
    """Mean of the lowest share ``k`` of the scores, of at least one; NaN of none."""
    if not len(scores):
        return float("nan")
    return float(np.sort(scores)[: max(1, int(len(scores) * k))].mean(dtype=np.float64))


def _auc(forget: list[Scored], holdout: list[Scored], score: Callable[[Scored], float]) -> Value:
    parts = {
        "forget": np.array([score(answer) for answer in forget]),
        "holdout": np.array([score(answer) for answer in holdout]),
    }
    members, others = (scores[np.isfinite(scores)] for scores in parts.values())
    value = float("nan")
    if len(members) and len(others):
        labels = np.repeat((0, 1), (len(members), len(others)))
        value = float(roc_auc_score(labels, np.concatenate((members, others))))
    return Value(
        value,
        {part: [{"score": float(s)} for s in scores] for part, scores in parts.items()},
        unscored=len(forget) + len(holdout) - len(members) - len(others),
    )
