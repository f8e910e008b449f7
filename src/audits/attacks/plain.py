"""Ask as evaluation asks."""

import numpy as np

from unlora.audits.attack import Scores, attack
from unlora.evals.records import Scored


@attack("plain")
def plain(answers: list[Scored]) -> Scores:
    """Mean log-probability of the tokens of each answer, in nats."""
    return np.array([-answer.loss for answer in answers])
