"""Ascend on the model's own beliefs, not on the answer alone (BST)."""

from jaxtyping import Float
from torch import Tensor

from unlora.forward.outputs import Outputs
from unlora.objectives import objective
from unlora.registry import AtLeastOne, UpToOne


@objective("BST")
def bootstrapping_token(
    policy_forget: Outputs, *, lambda_bst: UpToOne = 0.2, top_k: AtLeastOne = 20
) -> Float[Tensor, " rows"]:
    """sum_v t_v log p_v, where t mixes the answer with the policy's own likeliest tokens (BS-T).

    Li et al. 2025, arXiv:2510.19422; defaults, and the mean over each answer before that over
    answers, from the authors' code. Ascent on the answer alone moves its probability to such
    tokens, which often say the same.

    Args:
        lambda_bst: weight of the beliefs, softmax over the ``top_k`` logits and a constant; the
            answer's token has the rest. 0 is gradient ascent.
    """
    logits = policy_forget.logits
    likeliest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values
    logps = likeliest - logits.logsumexp(-1, keepdim=True)
    believed = (likeliest.detach().softmax(-1) * logps).sum(-1)
    mixed = lambda_bst * believed + (1 - lambda_bst) * policy_forget.token_logps
    return policy_forget.mean_by_row(mixed)
