"""When a model is called collapsed: the one definition for logs, tables and pages."""

import math


def why_collapsed(
    utility: float,
    repetition: float,
    target: float | None = None,
    *,
    unscored: int = 0,
    utility_share: float = 0.5,
    utility_floor: float = 0.1,
    max_repetition: float = 0.5,
) -> list[str]:
    """Why a model is broken, in words; nothing for a sound one.

    A model that answers everything with noise has forgotten, too; it must not pass for success.
    What is NaN says nothing either way.

    Args:
        utility: 0..1, of what it should still know.
        repetition: share of repeated runs of four words in what it writes about that, 0..1.
        target: the utility before unlearning; None where it is not known.
        unscored: rows of the utility without a score; without a utility they mean logits that are
            not finite.
        utility_share: collapsed below this share of the target's utility.
        utility_floor: collapsed below this utility, where the target's is not known or is below
            it itself.
        max_repetition: collapsed above this repetition.
    """
    reasons = []
    if math.isnan(utility) and unscored:
        reasons.append(f"the utility has no value: {unscored} rows could not be scored")
    elif target is not None and target >= utility_floor:
        if utility < utility_share * target:
            reasons.append(
                f"utility {utility:.3g} is below {utility_share:g} of the target's {target:.3g}"
            )
    elif utility < utility_floor:
        reasons.append(f"utility {utility:.3g} is below {utility_floor:g}")
    if repetition > max_repetition:
        reasons.append(f"repetition {repetition:.3g} is above {max_repetition:g}")
    return reasons
