"""Keep the losses of a whole run, those before a resumed checkpoint included.

Trainer forgets at a checkpoint what it has added up since the last entry of the log, and what the
run has lost before it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor


@dataclass
class Progress:
    """Sums of the loss over optimiser steps, each the mean over all processes.

    Attributes:
        total: up to the last entry of the log.
        since_log: from there to the checkpoint that the run goes on from.
        logged_at: the step of the last entry.
        known_from: the step from which on the losses are known.
    """

    total: float = 0.0
    since_log: float = 0.0
    logged_at: int = 0
    known_from: int = 0

    def log(self, loss: float, step: int) -> float:
        """The mean over the steps since the last entry, which count as logged from now on.

        Args:
            loss: the sum of those that this call has made.
        """
        loss, steps = loss + self.since_log, step - self.logged_at
        self.total, self.since_log, self.logged_at = self.total + loss, 0.0, step
        return loss / max(steps, 1)

    def mean(self, loss: float, step: int) -> float:
        """The mean over the whole run; ``loss`` is the sum since the last entry, in this call."""
        return (self.total + self.since_log + loss) / max(step - self.known_from, 1)

    def facts(self, loss: float) -> dict[str, float]:
        """For a checkpoint; ``loss`` as in :meth:`mean`."""
        return asdict(self) | {"since_log": self.since_log + loss}

    @classmethod
    def of(cls, facts: Mapping[str, Any] | None, step: int) -> "Progress":
        """What a checkpoint has kept, which is of this step; nothing where it has not."""
        return cls(**facts) if facts else cls(logged_at=step, known_from=step)


def mean_of_processes(accelerator: Any, loss: Tensor | None) -> float:
    """A sum of losses as the mean over all processes; all of them must ask."""
    return 0.0 if loss is None else float(accelerator.reduce(loss.detach().clone(), "mean"))
