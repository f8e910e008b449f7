"""Look below the last layer. arXiv:2605.24614."""

from unlora.audits.attack import PatchedLogps, attack
from unlora.audits.residual import Scores


@attack("depth")
def depth(patched: PatchedLogps) -> Scores:
    """Mean over layers of the log-probability that the target reads from a model's inner states.

    It is the Unlearning Depth Score on the scale of the other attacks. With d1 and d2, by how much
    the target's log-probability falls when it reads the states of the retain model and of the
    unlearned one behind a layer, that score is sum(d1 * clip(d2 / d1, 0, 1)) / sum(d1), over the
    layers where d1 is above 0.05 and the tokens of a name. The residual of these scores is
    1 - sum(d2) / sum(d1), over all layers and rows and all tokens of an answer: 0 where the score
    is 1. A layer weighs what the retain model changes there, so it needs no threshold; nothing is
    clipped, so that forgetting too much shows, and can make up for another layer.
    """
    return patched.mean(axis=0)
