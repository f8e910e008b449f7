"""Infer membership: does a score tell what was trained on (forget) from what was not (holdout)?

Every score is *low* for members, as a loss is. The value is the area under the ROC curve, the
probability that a forget example scores below a holdout example: 1 when the model plainly
remembers, 0.5 at chance, below 0.5 when forgetting went too far. Examples without a score are NaN
and left out; with no example left on one side the value is NaN. The interval is that of a
bootstrap within each side.
"""

import zlib
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Int

from unlora.evals.metrics import metric
from unlora.evals.records import GradientNorms, RootScored, Scored
from unlora.registry import Share
from unlora.results.value import RESAMPLES, Value

TINY = 1e-10
CELLS_AT_ONCE = 1 << 18  # counts held in memory while resampling: few, so that they stay near


@metric("mia_loss", higher_is_better=False)
def mia_loss(forget: list[Scored], holdout: list[Scored]) -> Value:
    """Mean loss per token. Yeom et al. 2018, arXiv:1709.01604."""
    return _auc((a.loss for a in forget), (a.loss for a in holdout))


@metric("mia_zlib", higher_is_better=False)
def mia_zlib(forget: list[Scored], holdout: list[Scored]) -> Value:
    """Mean loss over the compressed size of the text in bytes. Carlini et al. 2021."""

    def score(answer: Scored) -> float:
        return answer.loss / len(zlib.compress(answer.text.encode()))

    return _auc(map(score, forget), map(score, holdout))


@metric("mia_min_k", higher_is_better=False)
def mia_min_k(forget: list[Scored], holdout: list[Scored], *, k: Share = 0.4) -> Value:
    """Mean loss of the share ``k`` of tokens with the lowest probability. arXiv:2310.16789."""

    def score(answer: Scored) -> float:
        return -_lowest(answer.without_end().logp, k)

    return _auc(map(score, forget), map(score, holdout))


@metric("mia_min_k_plus_plus", higher_is_better=False)
def mia_min_k_plus_plus(forget: list[Scored], holdout: list[Scored], *, k: Share = 0.4) -> Value:
    """Min-k on log-probabilities standardised over the vocabulary. arXiv:2404.02936."""

    def score(answer: Scored) -> float:
        answer = answer.without_end()
        return -_lowest((answer.logp - answer.mean) / np.sqrt(np.maximum(answer.var, 1e-6)), k)

    return _auc(map(score, forget), map(score, holdout))


@metric("mia_reference", higher_is_better=False)
def mia_reference(
    forget: list[Scored],
    holdout: list[Scored],
    forget_root: RootScored,
    holdout_root: RootScored,
) -> Value:
    """Mean loss minus that of the root model, which has seen neither. arXiv:2111.08440.

    The root tells how hard a text is for any model. OpenUnlearning wants a reference model by path;
    ours is the model itself with every adapter off.
    """
    return _auc(
        (a.loss - root.loss for a, root in zip(forget, forget_root, strict=True)),
        (a.loss - root.loss for a, root in zip(holdout, holdout_root, strict=True)),
    )


@metric("mia_gradnorm", higher_is_better=False)
def mia_gradnorm(forget: GradientNorms, holdout: GradientNorms) -> Value:
    """L2 norm of the gradient of the mean loss, over a declared set of weights. arXiv:2402.17012.

    OpenUnlearning averages the norms of whatever tensors have a gradient, so that its figure is
    another one for an adapter than for the same model merged.
    """
    return _auc(forget, holdout)


@metric("mia_recall", higher_is_better=False)
def mia_recall(
    forget: list[Scored],
    holdout: list[Scored],
    forget_after: list[Scored],
    holdout_after: list[Scored],
) -> Value:
    """ReCaLL, minus LL(x | P) / LL(x): texts of P, that were not trained on, disturb members more.

    arXiv:2406.15968. An answer that the texts before it have cut, or that is itself
    one of them, is NaN.
    """

    def score(alone: Scored, after: Scored) -> float:
        same = len(alone.logp) == len(after.logp)
        return -(after.loss + TINY) / (alone.loss + TINY) if same else float("nan")

    return _auc(map(score, forget, forget_after), map(score, holdout, holdout_after))


def _lowest(scores: np.ndarray, k: float) -> float:
    """Mean of the lowest share ``k`` of the scores, of at least one; NaN of none."""
    if not len(scores):
        return float("nan")
    return float(np.sort(scores)[: max(1, int(len(scores) * k))].mean(dtype=np.float64))


def _auc(forget: Iterable[float], holdout: Iterable[float]) -> Value:
    parts = {"forget": np.array([*forget], float), "holdout": np.array([*holdout], float)}
    members, others = (scores[np.isfinite(scores)] for scores in parts.values())
    value, interval = float("nan"), None
    if len(members) and len(others):
        value = float(_areas(members, others)[0])
        if min(len(members), len(others)) > 1:
            low, high = np.percentile(_resampled(members, others), (2.5, 97.5))
            interval = float(low), float(high)
    return Value(
        value,
        {part: [{"score": float(s)} for s in scores] for part, scores in parts.items()},
        unscored=sum(map(len, parts.values())) - len(members) - len(others),
        interval=interval,
    )


def _resampled(
    members: Float[np.ndarray, " members"], others: Float[np.ndarray, " others"]
) -> Float[np.ndarray, " draws"]:
    """The area for draws with replacement from both sides."""
    # a generator for each side, so that it does not matter how many draws are made at once
    draw_members, draw_others = np.random.default_rng(0).spawn(2)
    at_once = max(1, CELLS_AT_ONCE // (len(members) + len(others)))
    sizes = [min(at_once, RESAMPLES - start) for start in range(0, RESAMPLES, at_once)]
    aucs = [
        _areas(
            members,
            others,
            draw_members.integers(len(members), size=(size, len(members))),
            draw_others.integers(len(others), size=(size, len(others))),
        )
        for size in sizes
    ]
    return np.concatenate(aucs)


def _areas(
    members: Float[np.ndarray, " members"],
    others: Float[np.ndarray, " others"],
    drawn_members: Int[np.ndarray, "draws members"] | None = None,
    drawn_others: Int[np.ndarray, "draws others"] | None = None,
) -> Float[np.ndarray, " draws"]:
    """Share of the pairs in which the member scores lower, ties counted half; exact.

    Without draws that of all examples, once.
    """
    _, codes = np.unique(np.concatenate((members, others)), return_inverse=True)
    size = int(codes.max()) + 1

    def histograms(side: np.ndarray, drawn: np.ndarray | None) -> Int[np.ndarray, "draws size"]:
        rows = side[None] if drawn is None else side[drawn]
        shifted = rows + size * np.arange(len(rows))[:, None]
        return np.bincount(shifted.ravel(), minlength=len(rows) * size).reshape(len(rows), size)

    of_members = histograms(codes[: len(members)], drawn_members)
    of_others = histograms(codes[len(members) :], drawn_others)
    above = len(others) - of_others.cumsum(axis=1) + of_others / 2
    return (of_members * above).sum(axis=1) / (len(members) * len(others))
