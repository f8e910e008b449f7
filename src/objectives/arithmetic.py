"""Learn what is to be forgotten, so that it can be subtracted (task arithmetic).

Training makes the task vector of the forget data; when it is over, ``unlora.trainer.task_vector``
turns it round.
"""

from jaxtyping import Float
from torch import Tensor

from unlora.forward.outputs import TokenLogps
from unlora.objectives import objective
from unlora.registry import AtLeastOne, Positive


@objective("Negation")
def negation(policy_forget: TokenLogps, *, scale: Positive = 1.0) -> Float[Tensor, " tokens"]:
    """Negative log-likelihood of the forget answers; afterwards theta - scale * what was learnt.

    Task arithmetic, Ilharco et al. 2022, arXiv:2212.04089; for adapters Zhang et al. 2023,
    arXiv:2306.14870: of B A, one factor changes its sign.

    Args:
        scale: how much of the task vector is subtracted.
    """
    return -policy_forget.token_logps


@objective("PerTA")
def per_parameter(
    policy_forget: TokenLogps, *, scale: Positive = 1.0, num_rows: AtLeastOne = 64
) -> Float[Tensor, " tokens"]:
    """Like Negation, with a share of its own for every weight.

    arXiv:2601.22030. theta - scale * w * what was learnt, w = F_forget / (F_forget + F_retain), F
    the diagonal Fisher information of a weight. The paper's abstract says what w is made of; its
    equation was not at hand, and this one is derived from it.

    Args:
        num_rows: rows of each part from which F is estimated.
    """
    return -policy_forget.token_logps
