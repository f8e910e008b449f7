"""Pack rows of unequal length into few sequences of equal length, with hardly any padding.

A A A A A B B B            rows follow one another in a sequence; positions start again with
C C C C D D D .            each row, and no token sees another row's
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from unlora.forward.row_attention import arrange

MOST_TRIED = 64  # numbers of sequences


@dataclass(frozen=True)
class Layout:
    """Where the tokens of several batches lie in the input of one forward pass.

    Attributes:
        inputs: of the model.
        offsets: of each batch, where in the flattened input each of its rows begins, but for the
            first ``common`` tokens.
        common: number of tokens at the beginning of the input with which every row begins.
    """

    inputs: Mapping[str, Any]
    offsets: Sequence[Int[Tensor, " rows"]]
    common: int = 0

    def places(
        self, batch: int, row: Int[Tensor, " tokens"], position: Int[Tensor, " tokens"]
    ) -> Int[Tensor, " tokens"]:
        """Where in the flattened input these tokens of a batch lie."""
        return torch.where(position < self.common, position, self.offsets[batch][row] + position)


def padded(batch: Mapping[str, Tensor]) -> Layout:
    """A batch as it is: one row a sequence."""
    ids = batch["input_ids"]
    begin = torch.arange(len(ids), device=ids.device) * ids.shape[1]
    return Layout({"input_ids": ids, "attention_mask": batch["attention_mask"]}, [begin])


def packed(batches: Sequence[Mapping[str, Tensor]], *, width: int, single: bool = False) -> Layout:
    """The rows of all batches in as many sequences as make the least work.

    There is no attention mask: transformers tells the rows of a sequence apart where positions
    start again.

    Args:
        width: of the model's hidden states; weighs attention against the rest.
        single: all rows in a single sequence, as flash attention wants them.
    """
    lengths = [n for batch in batches for n in batch["attention_mask"].sum(-1).tolist()]
    padded_rows = [ids for batch in batches for ids in batch["input_ids"]]
    rows = [ids[:length] for ids, length in zip(padded_rows, lengths, strict=True)]
    places = torch.arange(sum(lengths), device=rows[0].device)
    # of very many rows not every number is tried: that would take longer than it gains
    counts = [1] if single else [*range(1, len(rows), 1 + len(rows) // MOST_TRIED), len(rows)]
    bins = min((_filled(lengths, n) for n in counts), key=lambda b: _work(b, lengths, width))
    long = _longest(bins, lengths)
    ids = rows[0].new_zeros(len(bins), long)
    positions = torch.zeros_like(ids)
    begin = [0] * len(rows)
    for n, numbers in enumerate(bins):
        at = 0
        for number in numbers:
            end = at + lengths[number]
            ids[n, at:end] = rows[number]
            positions[n, at:end] = places[: end - at]
            begin[number] = n * long + at
            at = end
        # what is left of a sequence is a row of its own, which nobody asks about
        positions[n, at:] = places[: long - at]
    starts = torch.tensor(begin, device=ids.device)
    counts_of = [len(batch["input_ids"]) for batch in batches]
    return Layout({"input_ids": ids, "position_ids": positions}, starts.split(counts_of))


def flat(batches: Sequence[Mapping[str, Tensor]], *, common: int) -> Layout:
    """The rows of all batches one after another in a single sequence, attended to row by row.

    Args:
        common: number of tokens with which rows begin alike; they come once.
    """
    lengths = [n for batch in batches for n in batch["attention_mask"].sum(-1).tolist()]
    rows = [ids for batch in batches for ids in batch["input_ids"]]
    beginning = rows[0][:common]
    if common >= min(lengths) or not all(torch.equal(ids[:common], beginning) for ids in rows):
        common = 0  # a row that stands for another
    arranged = arrange(lengths, common, beginning.device)
    own = [torch.arange(common, length, device=beginning.device) for length in lengths]
    positions = torch.cat([torch.arange(common, device=beginning.device), *own])
    parts = [ids[common:length] for ids, length in zip(rows, lengths, strict=True)]
    inputs = {
        "input_ids": torch.cat([beginning[:common], *parts])[None],
        "position_ids": positions[None],
        # transformers makes no mask where it is given one as large as it would make
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=beginning.device),
        "rows": arranged,
    }
    own_lengths = torch.tensor(lengths, device=beginning.device) - common
    starts = own_lengths.cumsum(0) - own_lengths  # the common tokens before, and in its positions
    return Layout(inputs, starts.split([len(batch["input_ids"]) for batch in batches]), common)


def _filled(lengths: Sequence[int], count: int) -> list[list[int]]:
    """The rows in this many sequences of about one length: the longest first, to the shortest."""
    bins: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, n) for n in range(count)]
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length, n = filled[0]
        bins[n].append(number)
        heapreplace(filled, (length + lengths[number], n))
    return bins


def _longest(bins: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    return max(sum(lengths[i] for i in numbers) for numbers in bins)


def _work(bins: Sequence[Sequence[int]], lengths: Sequence[int], width: int) -> float:
    """Multiply-adds of one layer, but for a factor.

    A token meets some 12 width^2 weights, and in attention 2 width numbers of every place.
    """
    long = _longest(bins, lengths)
    return len(bins) * long * (12 * width + 2 * long)
