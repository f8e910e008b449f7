"""Teach another answer to the forget questions (IdkNLL, FLAT)."""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unlora.forward.outputs import TokenLogps
from unlora.objectives import objective

# name -> g and f*(g(.)) of the variational form sup E[g] - E[f*(g)]
DIVERGENCES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "TV": (lambda v: v.tanh() / 2, lambda v: v.tanh() / 2),
    "KL": (lambda v: v, lambda v: (v - 1).exp()),
    "JS": (
        lambda v: math.log(2) - F.softplus(-v),
        lambda v: F.softplus(v) - math.log(2),
    ),
    "Pearson": (lambda v: v, lambda v: v**2 / 4 + v),
}


@objective("IdkNLL")
def idk_nll(policy_alternate: TokenLogps) -> Float[Tensor, " tokens"]:
    """Negative log-likelihood of the alternate answers, in nats per token.

    TOFU's preference baseline (IDK), Maini et al. 2024, arXiv:2401.06121.
    """
    return -policy_alternate.token_logps


@objective("FLAT")
def flat(
    policy_forget: TokenLogps,
    policy_alternate: TokenLogps,
    *,
    divergence: Literal["TV", "KL", "JS", "Pearson"] = "TV",
) -> Float[Tensor, " rows"]:
    """Widen an f-divergence between alternate and forget answer: -g(P_alternate) + f*(g(P_forget)).

    Wang et al. 2024, arXiv:2410.11143, P being the mean probability of an answer's tokens.
    The divergences' g and f* as in the authors' code, which takes its P over prompt and padding
    as well (as zeros), and over the batch before f*; here each answer has its own P.
    """
    reward, cost = DIVERGENCES[divergence]
    return cost(_mean_probability(policy_forget)) - reward(_mean_probability(policy_alternate))


def _mean_probability(outputs: TokenLogps) -> Float[Tensor, " rows"]:
    return outputs.mean_by_row(torch.exp(outputs.token_logps))
