"""Keep arrays in a temporary file, so that memory holds only those in use."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any
from weakref import finalize

import numpy as np
from jaxtyping import Bool, Int
from numpy.lib.format import read_array, write_array

from unlora.data.encoded import Encoded
from unlora.errors import InputError
from unlora.forward import IGNORE_INDEX

TOKEN = np.dtype(np.int32)


@dataclass(frozen=True)
class Stored:
    """Where some arrays stand in a file: the first byte, and their names."""

    begin: int
    names: tuple[str, ...]


@dataclass
class Spool:
    """A temporary file of arrays, which goes with this object."""

    file: IO[bytes] = field(default_factory=lambda: _temporary())
    end: int = 0

    def __post_init__(self) -> None:
        finalize(self, _close, self.file)

    def add(self, arrays: Mapping[str, np.ndarray]) -> Stored:
        """Write some arrays.

        Raises:
            OSError: the disk is full.
        """
        stored = Stored(self.end, tuple(arrays))
        self.file.seek(self.end)
        for array in arrays.values():
            write_array(self.file, array, allow_pickle=False)
        self.end = self.file.tell()
        return stored

    def read(self, stored: Stored) -> dict[str, np.ndarray]:
        """The arrays again."""
        self.file.seek(stored.begin)
        return {name: read_array(self.file, allow_pickle=False) for name in stored.names}


def _temporary() -> IO[bytes]:
    try:
        return tempfile.TemporaryFile()
    except FileNotFoundError as error:
        raise InputError(
            "An evaluation keeps its answers in temporary files, and no folder takes them: "
            f"{error}. Set TMPDIR to a folder that can be written."
        ) from error


def _close(file: IO[bytes]) -> None:
    with suppress(OSError):  # a full disk, which has been said
        file.close()


class TokenSpool(Sequence[list[Encoded]]):
    """The rows of each example as tokens, in a temporary file; a list is made when it is asked for.

    Attributes:
        tokens: of each example, in all of its rows.
        own: those of them that are not in the beginning that all rows share.
        cut: whether a row of the example was cut.
    """

    def __init__(self, examples: Iterable[Sequence[Encoded]]):
        self._spool = Spool()
        counts, lengths, cuts = [0], [0], []
        shared: np.ndarray | None = None
        for rows in examples:
            for row in rows:
                numbers = np.array([row.input_ids, row.labels], dtype=TOKEN)
                self._spool.file.write(numbers.tobytes())
                lengths.append(len(row.input_ids))
                cuts.append(row.cut)
                if row.input_ids:
                    shared = numbers[0] if shared is None else _common(shared, numbers[0])
            counts.append(counts[-1] + len(rows))
        self._first, self._cuts = np.array(counts), np.array(cuts, dtype=TOKEN)
        self._ends = np.cumsum(lengths)
        self.tokens = self._of_examples(lengths[1:])
        repeated = 0 if shared is None else len(shared)
        self.own = self.tokens - repeated * self._of_examples(np.array(lengths[1:]) > 0)
        self.cut: Bool[np.ndarray, " examples"] = self._of_examples(self._cuts > 0) > 0

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, example: Any) -> Any:
        """The rows of one example, or those of each of several."""
        if isinstance(example, slice):
            return [self[i] for i in range(*example.indices(len(self)))]
        i = range(len(self))[example]
        return [self._row(row) for row in range(self._first[i], self._first[i + 1])]

    @property
    def num_rows(self) -> int:
        """Rows of all examples."""
        return len(self._cuts)

    def _of_examples(self, numbers: Any) -> Int[np.ndarray, " examples"]:
        """The sum of a number of each row, by example."""
        sums = np.concatenate(([0], np.cumsum(numbers)))
        return np.diff(sums[self._first]).astype(np.int64)

    def _row(self, row: int) -> Encoded:
        begin, end = int(self._ends[row]), int(self._ends[row + 1])
        self._spool.file.seek(2 * TOKEN.itemsize * begin)
        numbers = np.frombuffer(self._spool.file.read(2 * TOKEN.itemsize * (end - begin)), TOKEN)
        ids = numbers[: end - begin].tolist()
        scored = (numbers[end - begin :] != IGNORE_INDEX).tolist()
        # one number is one object in both lists
        labels = [
            x if is_scored else IGNORE_INDEX for x, is_scored in zip(ids, scored, strict=True)
        ]
        return Encoded(ids, labels, int(self._cuts[row]))


def _common(first: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The beginning of two rows as far as they are equal."""
    length = min(len(first), len(other))
    differs = np.flatnonzero(first[:length] != other[:length])
    return first[: differs[0]] if len(differs) else first[:length]
