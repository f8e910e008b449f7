"""Look for traces of forgetting: rows that were deleted may be told by how unlikely they are."""

import numpy as np
from jaxtyping import Float

from unlora.results.value import Value

CENTRAL = 0.95  # of the holdout rows, that nothing was done to
FEWEST = 2  # holdout rows that span a band
Logps = Float[np.ndarray, " rows"]


def recognisable(
    unlearned_forget: Logps, retain_forget: Logps, unlearned_holdout: Logps, retain_holdout: Logps
) -> Value:
    """Share of forget rows that the unlearned model sees as it sees no row that nobody trained on.

    Range 0..1, 0.05 by chance. Such a row's mean log-probability differs from that of the retain
    model by less, or more, than those of the central 95 % of the holdout rows do. The interval is
    that of other forget rows. Rows without a log-probability are left out.
    """
    forget = unlearned_forget - retain_forget
    holdout = unlearned_holdout - retain_holdout
    holdout = holdout[np.isfinite(holdout)]
    if len(holdout) < FEWEST:
        return Value.missing(
            f"{len(holdout)} holdout rows have a log-probability; {FEWEST} or more are needed"
        )
    beyond = (1 - CENTRAL) / 2
    # with this method a new row is outside by chance as often with few holdout rows as with many
    low, high = np.quantile(holdout, (beyond, 1 - beyond), method="weibull")
    is_outside = np.where(np.isfinite(forget), (forget < low) | (forget > high), np.nan)
    rows = [
        {"difference": float(difference), "outside": float(outside)}
        for difference, outside in zip(forget, is_outside, strict=True)
    ]
    return Value.mean(rows, "outside")
