"""What a model said about one example: all that a metric ever sees of a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NewType

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import bootstrap

RESAMPLES, AT_ONCE = 2000, 100  # so many draws of all rows are in memory


@dataclass(frozen=True)
class Scored:
    """A teacher-forced answer: one entry per scored token, in nats.

    Four numbers per token are enough for every likelihood metric, so the [tokens, vocabulary]
    matrix never outlives the forward pass. A row on which the model's logits are not finite has no
    token here, as an empty answer has none: there is nothing to score.

    Attributes:
        logp: log p(token).
        hit: whether the greedy prediction is the token.
        mean: E_v[log p(v)] over the vocabulary, under the model's own distribution.
        var: Var_v[log p(v)], likewise.
        text: the answer's text, without special tokens.
        ended: whether the last token is the template's end token.
    """

    logp: Float[np.ndarray, " tokens"]
    hit: Bool[np.ndarray, " tokens"]
    mean: Float[np.ndarray, " tokens"]
    var: Float[np.ndarray, " tokens"]
    text: str
    ended: bool

    def without_end(self) -> "Scored":
        """The same without the end token, which every answer shares; plain text has none."""
        if not self.ended:
            return self
        return replace(
            self,
            logp=self.logp[:-1],
            hit=self.hit[:-1],
            mean=self.mean[:-1],
            var=self.var[:-1],
            ended=False,
        )

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per token; NaN where no token is scored."""
        return -float(self.logp.mean(dtype=np.float64)) if len(self.logp) else float("nan")


@dataclass(frozen=True)
class Generated:
    """What a model wrote after a prompt, beside what it should have written.

    Attributes:
        text: None where the logits were not finite, so that the model wrote nothing of its own.
    """

    prompt: str
    reference: str
    text: str | None


@dataclass(frozen=True)
class Value:
    """A metric's result.

    Attributes:
        value: NaN when there was nothing to score.
        per_example: one entry per example, in the order of the data; for membership inference
            one such list for each of ``forget`` and ``holdout``.
        unscored: number of examples that could not be scored; they are not part of ``value``.
        not_computed: why there is no value, where something it needs is missing.
        cut: number of examples that were cut to the maximal length of their data.
        interval: the 95 % interval of the value over other draws of as many examples; of a mean
            the percentile bootstrap.
        note: what a reader should know of the value, in words.
    """

    value: float
    per_example: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Mapping[str, Any]]] | None = (
        None
    )
    unscored: int = 0
    not_computed: str | None = None
    cut: int = 0
    interval: tuple[float, float] | None = None
    note: str | None = None

    @property
    def not_scored(self) -> str | None:
        """Why the value is NaN, where all it needs is there."""
        if self.not_computed or np.isfinite(self.value):
            return None
        if self.unscored:
            return (
                f"{self.unscored} rows could not be scored and too few are left: they hold nothing "
                "to score, the model's logits are not finite, or a thought has no end"
            )
        return "what it is computed from has no value, or there are no rows"

    @staticmethod
    def mean(rows: Sequence[Mapping[str, Any]], key: str) -> "Value":
        """The mean of one column, over the rows that could be scored."""
        return Value.mean_of(Value(float("nan"), rows).column(key), rows)

    @staticmethod
    def mean_of(
        scores: Float[np.ndarray, " examples"], rows: Sequence[Mapping[str, Any]]
    ) -> "Value":
        """The mean of one score per row, over the rows that could be scored."""
        scored = scores[np.isfinite(scores)]
        value = float(scored.mean()) if len(scored) else float("nan")
        return Value(
            value, rows, unscored=len(scores) - len(scored), interval=interval_of_mean(scored)
        )

    @staticmethod
    def missing(reason: str) -> "Value":
        """No value, and why."""
        return Value(float("nan"), not_computed=reason)

    def column(self, key: str) -> Float[np.ndarray, " examples"]:
        """One number per example: of several answers the mean, NaN where there is none."""
        rows = [] if isinstance(self.per_example, Mapping) else self.per_example or []
        cells = [row[key] for row in rows]
        if cells and isinstance(cells[0], (list, tuple)):
            cells = [np.mean(np.array(c, dtype=np.float64)) if len(c) else np.nan for c in cells]
        return np.array(cells, dtype=np.float64)


def interval_of_mean(scores: Float[np.ndarray, " examples"]) -> tuple[float, float] | None:
    """95 % interval of a mean: the percentile bootstrap. None for fewer than two scores."""
    if len(scores) < 2:
        return None
    found = bootstrap(
        (scores,), np.mean, n_resamples=RESAMPLES, batch=AT_ONCE, method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


# What a metric may ask for beside ``list[Scored]``, ``list[list[Scored]]`` and ``list[Generated]``.
# A new type says who is asked, or what: the records themselves look alike.

Reference = NewType("Reference", Value)
"""A value from the log of the model that was trained without the forget data."""

Target = NewType("Target", Value)
"""A value from the log of the model before it was made to forget."""

RootScored = NewType("RootScored", list)
"""list[Scored]: what the root model, every adapter off, makes of the answers."""

Reread = NewType("Reread", list)
"""list[Scored | None]: what the root model makes of the texts that the model has written.

None where it has written none, as its logits were not finite."""

Legible = NewType("Legible", list)
"""list[float]: a classifier's probability that what the model has written is clean text."""

GradientNorms = NewType("GradientNorms", list)
"""list[float]: L2 norm of the gradient of each answer's mean loss, over a declared set of weights.

NaN where there is nothing to score."""

States = NewType("States", list)
"""list[Float[ndarray, "layers width"]]: mean hidden state over each answer's tokens, by layer."""

RootStates = NewType("RootStates", list)
"""The same of the root model, every adapter off."""
