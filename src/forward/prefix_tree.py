"""Join rows that begin alike into one sequence: a tree of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Tree:
    """Rows as one sequence in which what they share stands once.

    Attributes:
        ids: the tokens.
        rows: numbers of the rows.
        paths: of each row, where its tokens stand.
    """

    ids: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    paths: list[np.ndarray] = field(default_factory=list)

    def add(self, row: int, ids: Sequence[int], shared: int) -> None:
        """Add a row whose first ``shared`` tokens are those of the row before."""
        begin = self.paths[-1][:shared] if self.paths else np.zeros(0, dtype=np.int32)
        own = np.arange(len(self.ids), len(self.ids) + len(ids) - shared, dtype=np.int32)
        self.ids += ids[shared:]
        self.rows.append(row)
        self.paths.append(np.concatenate((begin, own)))


def trees(read: Sequence[list[int]], *, per_token: float, per_pair: float, most: int) -> list[Tree]:
    """Write rows that begin alike together, as long as that costs less than reading them apart.

    Args:
        read: the tokens of each row.
        per_token, per_pair: what a token costs in the layers, and a pair of tokens in attention.
        most: tokens of a tree of several rows; 0: each row is a tree of its own.
    """
    made: list[Tree] = []
    before: Sequence[int] = ()
    for i in sorted(range(len(read)), key=lambda i: read[i]):
        ids = read[i]
        shared = _shared(before, ids)
        size, new = len(made[-1].ids) if made else 0, len(ids) - shared
        together = per_token * new + per_pair * ((size + new) ** 2 - size**2)
        apart = per_token * len(ids) + per_pair * len(ids) ** 2
        if not made or together > apart or size + new > most:
            made.append(Tree())
            shared = 0
        made[-1].add(i, ids, shared)
        before = ids
    return made


def _shared(first: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two rows have in common at their beginning."""
    length = min(len(first), len(other))
    return next((n for n in range(length) if first[n] != other[n]), length)


def _tree(rows: Sequence[tuple[int, Sequence[int], int]]) -> Tree:
    tree = Tree()
    for number, ids, shared in rows:
        tree.add(number, list(ids), shared)
    return tree
