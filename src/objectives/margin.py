"""Bounded or self-stopping terms on the gap between one token and the others."""

import torch
from jaxtyping import Float
from torch import Tensor

from unlora.objectives import objective
from unlora.outputs import Outputs


@objective("IHL")
def inverted_hinge(policy_forget: Outputs) -> Float[Tensor, " tokens"]:
    """1 + p(answer) - max p(other): the next best token takes over. Between 0 and 2.

    LoKU's forget loss, Cha et al. 2024, arXiv:2408.06621, from others' implementations of it; its
    adapter initialisation is not part of the loss.
    """
    logits, labels = policy_forget.logits, policy_forget.labels
    (best, second), (best_token, _) = (top.unbind(-1) for top in logits.topk(2, dim=-1))
    answer = logits.gather(1, labels[:, None]).squeeze(1)
    other = torch.where(best_token == labels, second, best)
    total = logits.logsumexp(-1)
    return 1 + (answer - total).exp() - (other - total).exp()


@objective("LogitMargin")
def logit_margin(policy_forget: Outputs) -> Float[Tensor, " tokens"]:
    """(largest logit - mean logit) squared: 0 where every token is as likely as any other.

    The forget loss of primal-dual unlearning (PDU), Entesari et al. 2025, arXiv:2506.05314, on
    answer tokens; Open-Unlearning averages over positions that are not the answer's as well.
    """
    logits = policy_forget.logits
    return (logits.amax(-1) - logits.mean(-1)) ** 2
