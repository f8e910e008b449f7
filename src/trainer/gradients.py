"""Combine gradients as SAM, GRU and BalDRO do; pure functions.

A gradient is a list of tensors, one for each trained parameter in the model's order.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from unlora.trainer.plugins import BalDRO

Gradient = list[Tensor]


def dot(first: Gradient, other: Gradient) -> Float[Tensor, ""]:
    """Compute <one, other> over all parameters, in float32 or better."""
    return torch.stack(
        [(a.float() * b.float()).sum().cpu() for a, b in zip(first, other, strict=True)]
    ).sum()


def project_out_conflict(forget: Gradient, retain: Gradient) -> Gradient:
    """Remove the forget gradient's component against the retain gradient (GRU, eq. 6)."""
    along = dot(forget, retain)
    if along >= 0:
        return forget
    share = along / dot(retain, retain)
    return [f - share.to(f) * r.to(f) for f, r in zip(forget, retain, strict=True)]


def ema(past: Gradient | None, now: Gradient, weight: float) -> Gradient:
    """Update a moving average that starts at 0; ``weight`` is that of the newest gradient."""
    if past is None:
        return [weight * new for new in now]
    return [weight * new + (1 - weight) * old for old, new in zip(past, now, strict=True)]


@contextmanager
def perturbed(parameters: Sequence[Tensor], direction: Gradient, distance: float) -> Iterator[None]:
    """Move the parameters ``distance`` along ``direction``; they come back bit by bit."""
    before = [p.detach().clone() for p in parameters]
    length = dot(direction, direction).sqrt().clamp(min=1e-12)
    with torch.no_grad():
        for p, d in zip(parameters, direction, strict=True):
            p.add_(d * (distance / length).to(d))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(parameters, before, strict=True):
                p.copy_(old)


def robust_weights(losses: Float[Tensor, " rows"], dro: BalDRO) -> Float[Tensor, " rows"]:
    """Compute BalDRO's weight of each row, adding up to 1; a constant for the gradient.

    Args:
        losses: -inf of a row that has none.
    """
    losses = losses.detach()
    if dro.variant == "DV":
        return torch.softmax(losses / dro.beta, dim=0)
    rows = int((losses > -torch.inf).sum())
    hardest = losses.topk(max(1, round(dro.share * rows))).indices
    return torch.zeros_like(losses).index_fill(0, hardest, 1 / len(hardest))
