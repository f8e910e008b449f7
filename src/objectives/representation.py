"""Steer the hidden states of forget data away (RMU, AdaptiveRMU).

``layer`` is counted from 0, in any architecture. The forward pass ends there, so nothing above it
is computed, and the trainer lets the weights above it rest.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from unlora.forward.outputs import Hidden
from unlora.objectives import objective
from unlora.registry import Index, Positive


def unit_vector(width: int, seed: int) -> Float[Tensor, " width"]:
    """A random direction of length 1, each coordinate drawn between 0 and 1 as in RMU's code."""
    drawn = np.random.default_rng(seed).random(width)
    return torch.tensor(drawn / np.linalg.norm(drawn), dtype=torch.float32)


@objective("RMU", draws={"control": unit_vector})
def rmu(
    policy_forget: Hidden,
    *,
    control: Float[Tensor, " width"],
    layer: Index = 7,
    steering_coeff: float = 2.0,
) -> Float[Tensor, " rows"]:
    """Mean squared distance of each token's state to one far point (representation misdirection).

    Li et al. 2024, arXiv:2403.03218: || h - c u || ** 2 with a random unit vector u, as a mean over
    coordinates and tokens like the authors' code. Open-Unlearning's mean mixes the lengths of the
    rows (``RMU_upstream``).

    Args:
        control: the direction u.
        steering_coeff: c, how far the point is from 0.
    """
    gap = policy_forget.states - steering_coeff * control
    return policy_forget.mean_by_row(gap.square().mean(-1))


@objective("AdaptiveRMU", draws={"control": unit_vector})
def adaptive_rmu(
    policy_forget: Hidden,
    reference_forget: Hidden,
    *,
    control: Float[Tensor, " width"],
    layer: Index = 7,
    beta: Positive = 5.0,
) -> Float[Tensor, " rows"]:
    """RMU whose far point is beta times as far as the row's states are long in the reference.

    Dang et al. 2024, arXiv:2408.06223, so that one setting fits every layer. The authors' code
    takes that length once, from the first batch of a run, padding included.

    Args:
        control: the direction u.
        beta: how far the point is, in lengths of the reference's states.
    """
    lengths = reference_forget.mean_by_row(reference_forget.states.norm(dim=-1))
    coefficients = beta * lengths[policy_forget.row, None]
    gap = policy_forget.states - coefficients * control
    return policy_forget.mean_by_row(gap.square().mean(-1))


@objective("EMBED_DIFF")
def embed_diff(
    policy_retain: Hidden, reference_retain: Hidden, *, layer: Index = 7
) -> Float[Tensor, " rows"]:
    """Mean squared change of each token's state. RMU's retain term, arXiv:2403.03218."""
    gap = policy_retain.states - reference_retain.states
    return policy_retain.mean_by_row(gap.square().mean(-1))
