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
    chance: float = 0.0,
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
            it itself; 0 where nobody knows what a sound model reaches, see :func:`why_unknown`.
        max_repetition: collapsed above this repetition.
        chance: the utility that guessing reaches; shares and the floor count from there.
    """
    above = utility - chance
    before = None if target is None else target - chance
    reasons = []
    if math.isnan(utility) and unscored:
        reasons.append(f"the utility has no value: {unscored} rows could not be scored")
    elif before is not None and before > 0 and before >= utility_floor:
        if above < utility_share * before:
            beyond = f", both counted from the {chance:g} that guessing reaches" if chance else ""
            reasons.append(
                f"utility {utility:.3g} is below {utility_share:g} of the target's "
                f"{target:.3g}{beyond}"
            )
    elif utility_floor > 0 and above < utility_floor:
        reasons.append(f"utility {utility:.3g} is below {utility_floor + chance:g}")
    if repetition > max_repetition:
        reasons.append(f"repetition {repetition:.3g} is above {max_repetition:g}")
    return reasons


def why_unknown(
    utility: float,
    target: float | None = None,
    *,
    unscored: int = 0,
    utility_floor: float = 0.1,
    chance: float = 0.0,
) -> str | None:
    """Why the utility does not tell whether a model is broken; None where it does.

    Arguments as in :func:`why_collapsed`.
    """
    if math.isnan(utility):
        return None if unscored else "there is no utility to tell by"
    if utility_floor > 0:
        return None
    if target is None or math.isnan(target):
        return "there is no target to compare the utility with"
    if target <= chance:
        return f"the target's own utility is {target:.3g}, so there was none to lose"
    return None
