"""Ask as evaluation asks."""

from unlora.audits.attack import attack, mean_logps
from unlora.audits.residual import Scores
from unlora.evals.records import Scored


@attack("plain")
def plain(answers: list[Scored]) -> Scores:
    """Mean log-probability of the tokens of each answer, in nats."""
    return mean_logps(answers)
