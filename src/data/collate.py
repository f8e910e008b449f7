"""Collate rows of unequal length into one padded batch."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from unlora.data.chat_encoding import Encoded
from unlora.data.pairs import BLANK
from unlora.forward import IGNORE_INDEX


def collate(rows: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """Pad on the right.

    Returns:
        int64 [batch time] ``input_ids``, ``attention_mask`` and ``labels``, and int64 [batch]
        ``number``, which row each is of its data set. The mask comes from the lengths, never from
        the pad id: a pad token may also occur in a text.
    """
    width = max(len(row.input_ids) for row in rows)

    def padded(values: Sequence[list[int]], fill: int) -> Tensor:
        return torch.tensor([[*v, *[fill] * (width - len(v))] for v in values], dtype=torch.long)

    return {
        "input_ids": padded([row.input_ids for row in rows], pad_id),
        "attention_mask": padded([[1] * len(row.input_ids) for row in rows], 0),
        "labels": padded([row.labels for row in rows], IGNORE_INDEX),
        "number": torch.tensor([row.number for row in rows]),
    }


def collate_parts(
    items: Sequence[Mapping[str, Encoded]], pad_id: int
) -> dict[str, dict[str, Tensor]]:
    """One batch for each part of the data: ``{"forget": batch, "retain": batch, ...}``.

    Blank rows are left out; but a process that has no others keeps one, to take part in the step.
    """
    present = [item for item in items if next(iter(item.values())).number != BLANK] or items[:1]
    return {part: collate([item[part] for item in present], pad_id) for part in items[0]}
