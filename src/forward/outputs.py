"""Hold what a model outputs for a batch.

What a loss wants to know decides what is computed, from nothing to everything:

    ScoredTokens    which tokens are scored; no model is asked
    SequenceLogps   one number for each row; of a reference it is computed once per run
    TokenLogps      one number for each scored token; logits exist for a moment, if at all
    Hidden          hidden states after one layer; the layers above never run
    Outputs         logits of the scored tokens
    Padded          logits of every position, as Open-Unlearning computes them
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class ScoredTokens:
    """The tokens that are to be predicted: no prompt, no padding, hence no mask.

    Attributes:
        labels: the tokens.
        row: which row of the batch each token belongs to, ascending.
        rows: number of rows in the batch.
    """

    labels: Int[Tensor, " tokens"]
    row: Int[Tensor, " tokens"]
    rows: int

    @cached_property
    def lengths(self) -> Int[Tensor, " rows"]:
        """Number of scored tokens of each row."""
        return torch.bincount(self.row, minlength=self.rows)

    @cached_property
    def starts(self) -> Int[Tensor, " rows"]:
        """Where each row begins among the tokens."""
        return self.lengths.cumsum(0) - self.lengths

    @cached_property
    def position(self) -> Int[Tensor, " tokens"]:
        """The place of each token in its row, from 0."""
        return torch.arange(len(self.row), device=self.row.device) - self.starts[self.row]

    def sum_by_row(self, per_token: Float[Tensor, " tokens"]) -> Float[Tensor, " rows"]:
        """Segment sum of one number per token."""
        return per_token.new_zeros(self.rows).index_add(0, self.row, per_token)

    def mean_by_row(self, per_token: Float[Tensor, " tokens"]) -> Float[Tensor, " rows"]:
        """Segment mean of one number per token."""
        return self.sum_by_row(per_token) / self.lengths


class TokenLogps(ScoredTokens):
    """How likely each scored token is, and no more; ``Outputs`` know it too."""

    if TYPE_CHECKING:

        @property
        def token_logps(self) -> Float[Tensor, " tokens"]:
            """log p(label) in nats."""

    @cached_property
    def sequence_logps(self) -> Float[Tensor, " rows"]:
        """log p(answer | prompt) in nats, summed over the answer's tokens."""
        return self.sum_by_row(self.token_logps)


@dataclass(frozen=True)
class GivenLogps(TokenLogps):
    """Log-probabilities that came without logits.

    Attributes:
        token_logps: log p(label) in nats.
    """

    token_logps: Float[Tensor, " tokens"]


@dataclass(frozen=True)
class Outputs(TokenLogps):
    """Next-token predictions of the scored tokens.

    Attributes:
        logits: float32 raw scores.
    """

    logits: Float[Tensor, "tokens vocab"]

    @cached_property
    def token_logps(self) -> Float[Tensor, " tokens"]:
        """log p(label) in nats."""
        return -F.cross_entropy(self.logits, self.labels, reduction="none")


@dataclass(frozen=True)
class Hidden(ScoredTokens):
    """What one layer makes of the scored tokens themselves.

    Attributes:
        states: float32 residual stream after the layer, at the position of each scored token.
    """

    states: Float[Tensor, "tokens width"]


@dataclass(frozen=True)
class SequenceLogps:
    """log p(answer | prompt) in nats, summed over the answer's tokens, and nothing else."""

    sequence_logps: Float[Tensor, " rows"]


@dataclass(frozen=True)
class Padded:
    """Logits of every position, prompt and padding included.

    Attributes:
        logits: position t predicts the token at t + 1.
        labels: not shifted; ``IGNORE_INDEX`` on everything that is not to be scored.
    """

    logits: Float[Tensor, "rows time vocab"]
    labels: Int[Tensor, "rows time"]
