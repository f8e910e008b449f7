"""Bound the forget loss, or let it stop by itself (IHL, PDU, BLADE)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from unlora.forward.outputs import Outputs
from unlora.objectives import objective
from unlora.registry import UpToOne


@objective("IHL")
def inverted_hinge(policy_forget: Outputs) -> Float[Tensor, " tokens"]:
    """1 + p(answer) - max p(other): the next best token takes over. Between 0 and 2.

    LoKU's forget loss, Cha et al. 2024, arXiv:2408.06621, from others' implementations of it; its
    start of the adapter is the plug-in FILA.
    """
    logits, labels = policy_forget.logits, policy_forget.labels
    (best, second), (best_token, _) = (top.unbind(-1) for top in logits.topk(2, dim=-1))
    answer = logits.gather(1, labels[:, None]).squeeze(1)
    other = torch.where(best_token == labels, second, best)
    total = logits.logsumexp(-1)
    return 1 + (answer - total).exp() - (other - total).exp()


@objective("PDU")
def logit_margin(policy_forget: Outputs) -> Float[Tensor, " tokens"]:
    """(largest logit - mean logit) squared: 0 where every token is as likely as any other.

    The forget loss of primal-dual unlearning, Entesari et al. 2025, arXiv:2506.05314; what holds
    the retain loss below a bound meanwhile is ``unlora.trainer.constraint``. On the positions that
    predict the answer, where Open-Unlearning takes those of the answer (``PDU_upstream``).
    """
    logits = policy_forget.logits
    return (logits.amax(-1) - logits.mean(-1)) ** 2


@objective("BLADE")
def clamped_entropy(policy_forget: Outputs, *, tau: UpToOne = 0.7) -> Float[Tensor, " tokens"]:
    """max(0, tau log V - H(p)), H the entropy in nats: 0 once the model is unsure enough.

    BLADE's forget loss, arXiv:2608.22557, from the authors' working code; what holds the retain
    loss below a bound is ``unlora.trainer.constraint``. On answer tokens, where the code takes the
    prompt's as well.

    Args:
        tau: share of the highest possible entropy that is enough.
    """
    logps = policy_forget.logits.log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    return (tau * math.log(logps.shape[-1]) - entropy).clamp(min=0)
