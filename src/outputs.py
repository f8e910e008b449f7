"""What one model said about one batch, and the one way to ask it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Outputs:
    """Next-token predictions of the scored tokens only: no prompt, no padding, hence no mask.

    Attributes:
        logits: float32 raw scores.
        labels: the tokens that were to be predicted.
        row: which row of the batch each token belongs to, ascending.
        rows: number of rows in the batch.
    """

    logits: Float[Tensor, "tokens vocab"]
    labels: Int[Tensor, " tokens"]
    row: Int[Tensor, " tokens"]
    rows: int

    @cached_property
    def token_logps(self) -> Float[Tensor, " tokens"]:
        """log p(label) in nats."""
        return -F.cross_entropy(self.logits, self.labels, reduction="none")

    @cached_property
    def sequence_logps(self) -> Float[Tensor, " rows"]:
        """log p(answer | prompt) in nats, summed over the answer's tokens."""
        return self.sum_by_row(self.token_logps)

    @cached_property
    def lengths(self) -> Int[Tensor, " rows"]:
        """Number of scored tokens of each row."""
        return torch.bincount(self.row, minlength=self.rows)

    def sum_by_row(self, per_token: Float[Tensor, " tokens"]) -> Float[Tensor, " rows"]:
        """Segment sum of one number per token."""
        return per_token.new_zeros(self.rows).index_add(0, self.row, per_token)


def ask(model: nn.Module, batch: Mapping[str, Tensor]) -> Outputs:
    """One forward pass; only scored positions reach the vocabulary projection.

    Args:
        model: a causal LM, wrapped or not (peft, DDP, ...).
        batch: int64 [batch time] ``input_ids``, ``attention_mask`` and ``labels``, where labels
            are ``IGNORE_INDEX`` on everything that is not to be scored. The first position of a
            row has no prediction and is never scored.
    """
    labels = batch["labels"][:, 1:]
    row, position = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
    with _project_only(model, row, position):
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
    scored = labels[row, position].to(logits.device)
    return Outputs(logits.flatten(0, 1).float(), scored, row.to(logits.device), len(labels))


@contextmanager
def _project_only(model: nn.Module, row: Tensor, position: Tensor) -> Iterator[None]:
    """Let the output embedding see the hidden states of these positions only."""

    def select(_module: nn.Module, args: Any) -> Any:
        hidden, *rest = args
        here = hidden.device  # of several, with device_map="auto"
        return (hidden[row.to(here), position.to(here)].unsqueeze(0), *rest)

    handle = output_embedding(model).register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def output_embedding(model: nn.Module) -> nn.Module:
    """The vocabulary projection, under any wrapper.

    Raises:
        TypeError: the model has none, so it is not a causal language model.
    """
    while not hasattr(model, "get_output_embeddings") and hasattr(model, "module"):
        model = model.module
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise TypeError(f"{type(model).__name__} has no output embedding: not a causal LM")
    return head
