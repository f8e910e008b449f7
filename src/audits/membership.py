"""Tell forget rows from rows never seen by attacks of membership inference."""

from collections.abc import Sequence

from unlora.evals.metrics.mia import mia_loss, mia_min_k, mia_min_k_plus_plus
from unlora.evals.records import Scored
from unlora.results.value import Value


def membership(forget: Sequence[Scored], holdout: Sequence[Scored]) -> dict[str, Value]:
    """AUC of membership inference; to be compared with the retain model's, from both sides."""
    parts = list(forget), list(holdout)
    return {
        "loss": mia_loss(*parts),
        "min_k": mia_min_k(*parts),
        "min_k_plus_plus": mia_min_k_plus_plus(*parts),
    }
