"""Average the numbers that a run logs, over the steps since its last log entry."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from accelerate.utils import gather_object


class RunningMeans:
    """Collects numbers by name until they are logged as means over all processes."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)

    def add(self, name: str, value: float) -> None:
        """Add a number to the mean of this name."""
        self._values[name].append(value)

    def mark(self) -> dict[str, int]:
        """Count the numbers under each name, for the two methods below."""
        return {name: len(values) for name, values in self._values.items()}

    def merge_since(self, mark: Mapping[str, int]) -> None:
        """Replace the numbers that came since a mark by their sum, under each name."""
        for name, values in self._values.items():
            if new := values[mark.get(name, 0) :]:
                values[mark.get(name, 0) :] = [sum(new)]

    def drop_since(self, mark: Mapping[str, int]) -> None:
        """Remove the numbers that came since a mark."""
        for name, values in self._values.items():
            del values[mark.get(name, 0) :]

    def load(self, values: Mapping[str, Sequence[float]]) -> None:
        """Put back what :meth:`gather` gave."""
        self._values.update({name: [*numbers] for name, numbers in values.items()})

    def gather(self) -> dict[str, list[float]]:
        """Collect the numbers of all processes; each of them must call this."""
        processes = gather_object([dict(self._values)])
        names = dict.fromkeys(name for values in processes for name in values)
        return {name: [n for values in processes for n in values.get(name, ())] for name in names}

    def pop(self) -> dict[str, float]:
        """Average the numbers of all processes and begin again; each of them must call this."""
        means = {name: sum(v) / len(v) for name, v in self.gather().items() if v}
        self._values.clear()
        return means
