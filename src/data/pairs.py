"""Pair forget rows with retain rows."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from unlora.data.chat_encoding import Encoded

BLANK = -1  # number of a row that stands where there is none, and has no loss


@dataclass(frozen=True)
class Parts:
    """Several data sets drawn from together; one of them, the anchor, sets the length of an epoch.

    Attributes:
        rows: part -> its rows. ``alternate`` holds the same number of rows, one or more, for each
            forget row, in its order.
        anchor: the part of which every row is seen once in an epoch.
    """

    rows: Mapping[str, Sequence[Encoded]]
    anchor: str

    def __len__(self) -> int:
        return len(self.rows[self.anchor])

    def __getitem__(self, index: Mapping[str, int]) -> dict[str, Encoded]:
        """Return one row of each part in the index; for BLANK, a stand-in of that number."""
        return {
            part: replace(rows[max(index[part], 0)], number=index[part])
            for part, rows in self.rows.items()
            if part in index
        }


class KeyedSampler:
    """Rows of all parts for every step, fixed by (seed, epoch) alone.

    It reads no global random state, so it is the same for any number of processes and workers,
    and after a resumption. Every part runs through a permutation of its rows before one repeats;
    the anchor starts a new permutation with every epoch.

    Args:
        at_once: the rows of one micro-batch of all processes. An epoch is filled up with blanks to
            a multiple of it, so that all processes make as many steps, and no row comes twice.
    """

    def __init__(self, parts: Parts, seed: int, at_once: int = 1):
        self.parts, self.seed, self.at_once, self.epoch = parts, seed, at_once, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate and the trainer at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.parts) // self.at_once) * self.at_once

    def __iter__(self) -> Iterator[dict[str, int]]:
        drawn = {
            part: self._draws(part, len(rows))
            for part, rows in self.parts.rows.items()
            if part != "alternate"
        }
        choices, first_choice = self._alternates()
        for i in range(len(self.parts)):
            index = {part: int(rows[i]) for part, rows in drawn.items()}
            if choices:
                # every alternate of a row has its turn before one comes again
                seen_before = (self.epoch * len(self.parts) + i) // len(self.parts.rows["forget"])
                turn = (seen_before + first_choice[index["forget"]]) % choices
                index["alternate"] = index["forget"] * choices + int(turn)
            yield index
        for _ in range(len(self.parts), len(self)):
            yield dict.fromkeys(self.parts.rows, BLANK)

    def _alternates(self) -> tuple[int, np.ndarray]:
        """How many alternates each forget row has, and which is its first."""
        if "alternate" not in self.parts.rows:
            return 0, np.zeros(0, dtype=int)
        questions = len(self.parts.rows["forget"])
        choices = len(self.parts.rows["alternate"]) // questions
        draw = np.random.default_rng([self.seed, zlib.crc32(b"alternate")])
        return choices, draw.integers(choices, size=questions)

    def _draws(self, part: str, size: int) -> np.ndarray:
        """The rows of ``part`` for each step of this epoch."""
        length = len(self.parts)
        first = self.epoch * length
        cycles = range(first // size, (first + length - 1) // size + 1)
        order = np.concatenate([self._permutation(part, cycle, size) for cycle in cycles])
        return order[first % size :][:length]

    def _permutation(self, part: str, cycle: int, size: int) -> np.ndarray:
        return np.random.default_rng([self.seed, zlib.crc32(part.encode()), cycle]).permutation(
            size
        )
