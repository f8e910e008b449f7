"""Ascend with a weight per token; no gradient goes through the weight (WGA, SatImp)."""

import torch
from jaxtyping import Float
from torch import Tensor

from unlora.forward.outputs import TokenLogps
from unlora.objectives import objective
from unlora.registry import NotNegative


@objective("WGA")
def weighted_gradient_ascent(
    policy_forget: TokenLogps, *, beta: NotNegative = 1.0
) -> Float[Tensor, " tokens"]:
    """Ascent that stops at tokens already forgotten. Wang et al. 2025, arXiv:2502.19301.

    w_t log p_t with w_t = p_t ** beta. Same as Open-Unlearning's.

    Args:
        beta: 0 is gradient ascent.
    """
    logps = policy_forget.token_logps
    return (beta * logps.detach()).exp() * logps


@objective("SatImp")
def satimp(
    policy_forget: TokenLogps, *, beta1: NotNegative = 5.0, beta2: NotNegative = 1.0
) -> Float[Tensor, " tokens"]:
    """Saturation and importance as weights. Yang et al. 2025, arXiv:2505.11953.

    w_t log p_t with w_t = p_t ** beta1 * (1 - p_t) ** beta2. Same as Open-Unlearning's, with
    1 - p_t exact for confident tokens.

    Args:
        beta1: how fast a token that is already forgotten loses its weight (saturation).
        beta2: how much less a token counts that the model is sure of (importance).
    """
    logps = policy_forget.token_logps
    saturation = (beta1 * logps.detach()).exp()
    importance = (-torch.expm1(logps.detach())) ** beta2
    return saturation * importance * logps
