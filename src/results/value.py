"""Hold the result of a metric: a value, its interval, and one entry per example."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

RESAMPLES, AT_ONCE = 2000, 100  # so many draws of all rows are in memory


@dataclass(frozen=True)
class Value:
    """A metric's result.

    Attributes:
        value: NaN when there was nothing to score.
        per_example: one entry per example, in the order of the data; for membership inference
            one such list for each of ``forget`` and ``holdout``.
        unscored: number of examples that could not be scored; they are not part of ``value``.
        not_computed: why there is no value, where something it needs is missing.
        cut: number of examples that were cut to the maximal length of their data.
        interval: the 95 % interval of the value over other draws of as many examples; of a mean
            the percentile bootstrap.
        note: what a reader should know of the value, in words.
    """

    value: float
    per_example: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Mapping[str, Any]]] | None = (
        None
    )
    unscored: int = 0
    not_computed: str | None = None
    cut: int = 0
    interval: tuple[float, float] | None = None
    note: str | None = None

    @property
    def not_scored(self) -> str | None:
        """Why the value is NaN, where all it needs is there."""
        if self.not_computed or np.isfinite(self.value):
            return None
        if self.unscored:
            return (
                f"{self.unscored} rows could not be scored and too few are left: they hold nothing "
                "to score, the model's logits are not finite, or a thought has no end"
            )
        return "what it is computed from has no value, or there are no rows"

    @staticmethod
    def mean(rows: Sequence[Mapping[str, Any]], key: str) -> "Value":
        """The mean of one column, over the rows that could be scored."""
        return Value.mean_of(Value(float("nan"), rows).column(key), rows)

    @staticmethod
    def mean_of(
        scores: Float[np.ndarray, " examples"], rows: Sequence[Mapping[str, Any]]
    ) -> "Value":
        """The mean of one score per row, over the rows that could be scored."""
        scored = scores[np.isfinite(scores)]
        value = float(scored.mean()) if len(scored) else float("nan")
        return Value(
            value, rows, unscored=len(scores) - len(scored), interval=interval_of_mean(scored)
        )

    @staticmethod
    def missing(reason: str) -> "Value":
        """No value, and why."""
        return Value(float("nan"), not_computed=reason)

    def column(self, key: str) -> Float[np.ndarray, " examples"]:
        """One number per example: of several answers the mean, NaN where there is none."""
        rows = [] if isinstance(self.per_example, Mapping) else self.per_example or []
        cells = [row[key] for row in rows]
        if cells and isinstance(cells[0], (list, tuple)):
            cells = [np.mean(np.array(c, dtype=np.float64)) if len(c) else np.nan for c in cells]
        return np.array(cells, dtype=np.float64)


def interval_of_mean(
    scores: Float[np.ndarray, " examples"] | Sequence[float],
) -> tuple[float, float] | None:
    """95 % interval of a mean: the percentile bootstrap. None for fewer than two scores."""
    if len(scores) < 2:
        return None
    # scipy.stats.bootstrap gives the same, after seconds of imports
    values, rng = np.asarray(scores, dtype=np.float64), np.random.default_rng(0)
    means = [
        values[rng.integers(0, len(values), (AT_ONCE, len(values)))].mean(-1)
        for _ in range(RESAMPLES // AT_ONCE)
    ]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)
