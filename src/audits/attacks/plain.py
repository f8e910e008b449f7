"""Ask as evaluation asks."""

from unlora.audits.attack import Scores, attack, mean_logps
from unlora.evals.records import Scored


@attack("plain")
def plain(answers: list[Scored]) -> Scores:
    """Mean log-probability of the tokens of each answer, in nats."""
    return mean_logps(answers)
