"""Compute what Open-Unlearning computes where it differs from the papers.

Commit d3d7cf9 of locuslab/open-unlearning. These losses depend on how long the other rows of a
batch are and on how a batch is split; use them to reproduce, and nothing else.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unlora.forward import IGNORE_INDEX
from unlora.forward.outputs import Hidden, Padded
from unlora.objectives import objective
from unlora.objectives.representation import unit_vector
from unlora.registry import Index, NotNegative


@objective("UNDIAL_upstream")
def undial(
    policy_forget: Padded, reference_forget: Padded, *, beta: NotNegative = 10.0
) -> Float[Tensor, ""]:
    """UNDIAL's cross-entropy as a mean over prompt, answer and padding.

    Where there is no label, the logit of token |V| - 100 is lowered.
    """
    labels = policy_forget.labels[:, 1:].clone()
    logits, before = policy_forget.logits[:, :-1], reference_forget.logits[:, :-1]
    labels[labels == IGNORE_INDEX] += logits.shape[-1]
    down = torch.full_like(before[..., :1], -beta)
    target = before.scatter_add(-1, labels[..., None], down).softmax(-1)
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1))


@objective("KL_upstream")
def retain_kl(policy_retain: Padded, reference_retain: Padded) -> Float[Tensor, ""]:
    """KL(reference || policy) as a mean over prompt, answer and padding."""
    return F.kl_div(
        policy_retain.logits.log_softmax(-1).flatten(0, 1),
        reference_retain.logits.log_softmax(-1).flatten(0, 1),
        reduction="batchmean",
        log_target=True,
    )


@objective("RMU_upstream", draws={"control": unit_vector})
def rmu(
    policy_forget: Hidden,
    *,
    control: Float[Tensor, " width"],
    layer: Index = 7,
    steering_coeff: float = 2.0,
) -> Float[Tensor, ""]:
    """RMU's distance, each row's sum divided by every row's length."""
    gap = policy_forget.states - steering_coeff * control
    return _mixed_mean(policy_forget, gap)


@objective("EMBED_DIFF_upstream")
def embed_diff(
    policy_retain: Hidden, reference_retain: Hidden, *, layer: Index = 7
) -> Float[Tensor, ""]:
    """RMU's retain term, each row's sum divided by every row's length."""
    return _mixed_mean(policy_retain, policy_retain.states - reference_retain.states)


def _mixed_mean(states: Hidden, gap: Float[Tensor, "tokens width"]) -> Float[Tensor, ""]:
    sums = states.sum_by_row(gap.square().mean(-1))
    return (sums / states.lengths[:, None]).mean()


@objective("PDU_upstream")
def logit_margin(policy_forget: Padded) -> Float[Tensor, ""]:
    """PDU's margin at the positions of the answer's own tokens, which predict the next ones.

    Never at the first one of a row, which Open-Unlearning's data give no label even in plain text.
    """
    logits = policy_forget.logits[:, 1:][policy_forget.labels[:, 1:] != IGNORE_INDEX]
    # not amax, which would share the gradient among equal logits
    return ((logits.max(-1).values - logits.mean(-1)) ** 2).mean()
