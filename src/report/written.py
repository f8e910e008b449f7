"""Judge what a model writes about the forget data: whose secrets, and whether it is text."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from unlora.report.runs import Row
from unlora.report.suites import LEAKAGE, Suite

SOME, MOST = 0.1, 0.5  # shares of the answers
LEAST_FLUENCY = 0.1


@dataclass(frozen=True)
class Written:
    """What a run writes about the data to be forgotten; None is not known.

    Attributes:
        others: share of its answers that hold what another forget answer says.
        usual: the same share of the answers of the run to compare with, gold or else the target.
        usual_of: the role of that run.
        empty: share of its answers that have no word.
        repetition: share of repeated runs of four words.
        fluency: likelihood beside true answers, 0..1.
    """

    others: float | None = None
    usual: float | None = None
    usual_of: str = "gold"
    empty: float | None = None
    repetition: float | None = None
    fluency: float | None = None

    @property
    def leaks(self) -> bool:
        """Whether it answers with other rows' secrets more often than one that never saw them."""
        return self.others is not None and self.others - (self.usual or 0.0) >= SOME

    @property
    def leaks_mostly(self) -> bool:
        """The same of most answers: it has mixed up what it was to forget."""
        return self.leaks and self.others is not None and self.others >= MOST

    @property
    def not_text(self) -> str | None:
        """Why what it writes there is no text, where that is so."""
        if self.empty is not None and self.empty > MOST:
            return f"{100 * self.empty:.0f} % of its answers there are empty"
        if self.repetition is not None and self.repetition > MOST:
            return f"what it writes there repeats itself ({100 * self.repetition:.0f} %)"
        if self.fluency is not None and self.fluency < LEAST_FLUENCY:
            return f"what it writes there is hardly text (fluency {self.fluency:.2f})"
        return None


def written(row: Row, kind: str, suite: Suite, other: Row | None) -> Written:
    """What a run writes about the data to be forgotten.

    Args:
        other: gold or, without it, the target.
    """
    return Written(
        _mean(row.scores(kind, LEAKAGE, "other")),
        _mean(other.scores(kind, LEAKAGE, "other")) if other else None,
        other.role if other else "gold",
        _mean([not text.strip() for text in _texts(row, kind, suite)]),
        row.cell(kind, suite.forget_repetition).mean,
        row.cell(kind, suite.fluency).mean,
    )


def _texts(row: Row, kind: str, suite: Suite) -> list[str]:
    """Every answer to what is to be forgotten, of all seeds."""
    metrics = [name for name in suite.forget if name.endswith("_ROUGE")]
    entries = [entry for metric in metrics for entry in row.entries(kind, metric)]
    texts = (record.get("generation") for entry in entries for record in entry.rows)
    return [text for text in texts if isinstance(text, str)]


def _mean(shares: Sequence[float]) -> float | None:
    return fmean(shares) if shares else None
