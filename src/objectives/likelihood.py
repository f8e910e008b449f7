"""Ascend on the forget likelihood, descend on the retain likelihood."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unlora.forward.outputs import Outputs, TokenLogps
from unlora.objectives import objective


@objective("GradAscent")
def gradient_ascent(policy_forget: TokenLogps) -> Float[Tensor, " tokens"]:
    """Raise the forget loss. Jang et al. 2023, arXiv:2210.01504."""
    return policy_forget.token_logps


@objective("GradDiff")
def gradient_difference(policy_forget: TokenLogps) -> Float[Tensor, " tokens"]:
    """Gradient ascent that is meant to be paired with a retain term.

    Liu et al. 2022, arXiv:2203.12817. ``retain_loss_type`` NLL is their method; KL is TOFU's
    "KL minimisation" (Maini et al. 2024, arXiv:2401.06121).
    """
    return policy_forget.token_logps


@objective("NLL")
def retain_nll(policy_retain: TokenLogps) -> Float[Tensor, " tokens"]:
    """Negative log-likelihood of the retain answers, in nats per token."""
    return -policy_retain.token_logps


@objective("KL")
def retain_kl(policy_retain: Outputs, reference_retain: Outputs) -> Float[Tensor, " tokens"]:
    """KL(reference || policy) over the vocabulary, in nats. Maini et al. 2024, arXiv:2401.06121."""
    return F.kl_div(
        F.log_softmax(policy_retain.logits, dim=-1),
        F.log_softmax(reference_retain.logits, dim=-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
