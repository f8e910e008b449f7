"""Judge whether a model is collapsed: the one rule of logs, tables and pages."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """Whether a model is broken.

    Attributes:
        reasons: by which thresholds it is; none for a sound model.
        unknown: why the utility does not tell, where that is so and nothing else tells.
    """

    reasons: tuple[str, ...] = ()
    unknown: str | None = None


@dataclass(frozen=True)
class CollapseRule:
    """Thresholds below and above which a model is broken.

    A model that answers everything with noise has forgotten, too; it must not pass for success.

    Attributes:
        utility_share: collapsed below this share of the target's utility.
        utility_floor: collapsed below this utility, where the target's is not known or is below
            it itself; 0: only the target tells what a sound model reaches.
        max_repetition: collapsed above this repetition.
        chance: the utility that guessing reaches; shares and the floor count from there.
    """

    utility_share: float = 0.5
    utility_floor: float = 0.1
    max_repetition: float = 0.5
    chance: float = 0.0

    def judge(
        self, utility: float, repetition: float, target: float | None = None, unscored: int = 0
    ) -> Verdict:
        """Whether a model is broken; what is NaN says nothing either way.

        Args:
            utility: 0..1, of what it should still know.
            repetition: share of repeated runs of four words in what it writes about that, 0..1.
            target: the utility before unlearning; None where it is not known.
            unscored: rows of the utility without a score; without a utility they mean logits that
                are not finite.
        """
        low = self._why_utility_is_low(utility, target, unscored)
        high = repetition > self.max_repetition
        repeats = f"repetition {repetition:.3g} is above {self.max_repetition:g}" if high else None
        reasons = tuple(filter(None, (low, repeats)))
        return Verdict(reasons, None if reasons else self._why_unknown(utility, target))

    def _why_utility_is_low(
        self, utility: float, target: float | None, unscored: int
    ) -> str | None:
        above = utility - self.chance
        before = None if target is None else target - self.chance
        if math.isnan(utility) and unscored:
            return f"the utility has no value: {unscored} rows could not be scored"
        if before is not None and before > 0 and before >= self.utility_floor:
            if not above < self.utility_share * before:  # NaN is not
                return None
            counted = f", both counted from the {self.chance:g} that guessing reaches"
            return (
                f"utility {utility:.3g} is below {self.utility_share:g} of the target's "
                f"{target:.3g}{counted if self.chance else ''}"
            )
        if self.utility_floor > 0 and above < self.utility_floor:
            return f"utility {utility:.3g} is below {self.utility_floor + self.chance:g}"
        return None

    def _why_unknown(self, utility: float, target: float | None) -> str | None:
        if math.isnan(utility):
            return "there is no utility to tell by"
        if self.utility_floor > 0:
            return None
        if target is None or math.isnan(target):
            return "there is no target to compare the utility with"
        if target <= self.chance:
            return f"the target's own utility is {target:.3g}, so there was none to lose"
        return None
