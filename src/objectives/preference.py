"""Make the forget answer the one that is not preferred (NPO, SimNPO, DPO)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unlora.forward.outputs import SequenceLogps, TokenLogps
from unlora.objectives import objective
from unlora.registry import Positive


@objective("NPO")
def npo(
    policy_forget: TokenLogps, reference_forget: SequenceLogps, *, beta: Positive = 0.1
) -> Float[Tensor, " rows"]:
    """Negative preference optimisation. Zhang et al. 2024, arXiv:2404.05868.

    Args:
        beta: inverse temperature; beta -> 0 recovers gradient ascent.
    """
    log_ratio = policy_forget.sequence_logps - reference_forget.sequence_logps
    return -2 / beta * F.logsigmoid(-beta * log_ratio)


@objective("SimNPO")
def simnpo(
    policy_forget: TokenLogps, *, beta: Positive = 4.5, delta: float = 1.0
) -> Float[Tensor, " rows"]:
    """Reference-free NPO on the mean log-likelihood. Fan et al. 2024, arXiv:2410.07163.

    Args:
        beta: inverse temperature.
        delta: margin in nats per token inside the bracket; the paper writes it gamma / beta, so
            delta = gamma / beta of the paper.
    """
    mean_logps = policy_forget.sequence_logps / policy_forget.lengths
    return -2 / beta * F.logsigmoid(-beta * (mean_logps + delta))


@objective("DPO")
def dpo(
    policy_forget: TokenLogps,
    reference_forget: SequenceLogps,
    policy_alternate: TokenLogps,
    reference_alternate: SequenceLogps,
    *,
    beta: Positive = 0.1,
) -> Float[Tensor, " rows"]:
    """Prefer the alternate answer (IdkDPO: a refusal) to the one to forget.

    Rafailov et al. 2023, arXiv:2305.18290, equation 7, times 2 / beta as Open-Unlearning has it,
    so that its gradient has the scale of NPO's.
    """
    won = policy_alternate.sequence_logps - reference_alternate.sequence_logps
    lost = policy_forget.sequence_logps - reference_forget.sequence_logps
    return -2 / beta * F.logsigmoid(beta * (won - lost))
