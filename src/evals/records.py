"""Declare records: what a model said about one example, all that a metric ever sees of a model."""

from dataclasses import dataclass, replace
from typing import NewType

import numpy as np
from jaxtyping import Bool, Float

from unlora.results.value import Value


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
class Samples:
    """Texts drawn from a model after one prompt.

    Attributes:
        question: the prompt without special tokens.
        reference: what should come after it.
        texts: the draws; None where the logits were not finite.
    """

    question: str
    reference: str
    texts: tuple[str | None, ...]


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

Sampled = NewType("Sampled", list)
"""list[Samples]: texts that the model has drawn after each prompt, and what should have come."""

Legible = NewType("Legible", list)
"""list[float]: a classifier's probability that what the model has written is clean text."""

GradientNorms = NewType("GradientNorms", list)
"""list[float]: L2 norm of the gradient of each answer's mean loss, over a declared set of weights.

NaN where there is nothing to score."""

States = NewType("States", list)
"""list[Float[ndarray, "layers width"]]: mean hidden state over each answer's tokens, by layer."""

RootStates = NewType("RootStates", list)
"""The same of the root model, every adapter off."""
