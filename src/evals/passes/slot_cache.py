"""Keep keys and values in slots: rows grow at places of their own, and who ends makes room.

    slot 0   p p p p w w w .      p: tokens of the prompt
    slot 1   p p w . . . . .      w: tokens written; the dots are masked
    slot 2   p p p p p w w .

A row that ends leaves its slot to one that waits, or to the last slot's row. Nothing is copied from
step to step, so memory is what the slots take and does not scatter.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class SlotCache:
    """The keys and values of some rows, in every layer.

    Args:
        slots: rows at most.
        capacity: tokens of a row at most.

    Attributes:
        lengths: tokens of each row; a row of a slot each, in order.
        cache: what a model takes for the next token of all rows.
    """

    def __init__(self, slots: int, capacity: int):
        self.slots, self.capacity = slots, capacity
        self.lengths: list[int] = []
        self.cache = Cache(layers=[])

    @property
    def mask(self) -> Bool[Tensor, "rows time"]:
        """Which tokens the next ones see, themselves included."""
        lengths = torch.tensor(self.lengths)[:, None]
        return torch.arange(max(self.lengths) + 1) <= lengths

    def add(self, read: Any, places: Sequence[Int[Tensor, " tokens"]]) -> None:
        """Give each of these rows the next slot.

        Args:
            read: a model's own cache of what it has read.
            places: of each row, where its tokens stand in the flattened input.

        Raises:
            TypeError: the model remembers more, or something else, than keys and values.
        """
        layers = getattr(read, "layers", ())
        plain = type(read) is DynamicCache and all(type(layer) is DynamicLayer for layer in layers)
        if not plain or not layers:
            raise TypeError(f"{type(read).__name__} does not hold keys and values alone")
        if not self.cache.layers:
            shape = self.slots, self.capacity
            self.cache.layers = [_SlotLayer(self.lengths, *shape, layer) for layer in layers]
        first = len(self.lengths)
        self.lengths += map(len, places)
        for layer, new in zip(self.cache.layers, layers, strict=True):
            layer.fill(first, new, places)

    def grow(self) -> None:
        """Count the token that every row was asked about."""
        self.lengths[:] = [length + 1 for length in self.lengths]

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Let all other rows go; the last rows that stay move into the gaps.

        Args:
            rows: numbers of slots, ascending.

        Returns:
            The row that is now in each slot, by the number it had.
        """
        order = list(rows)
        gaps = [slot for slot in range(len(rows)) if slot not in set(rows)]
        for slot in gaps:
            last = order.pop()
            for layer in self.cache.layers:
                layer.move(last, slot)
            order.insert(slot, last)
        self.lengths[:] = [self.lengths[row] for row in order]
        return order


class _SlotLayer(DynamicLayer):
    """The keys and values of one layer, [slots, heads, capacity, width].

    Args:
        lengths: the list of all layers, so that memory is free as soon as its cache is.
    """

    def __init__(self, lengths: list[int], slots: int, capacity: int, like: DynamicLayer):
        super().__init__()
        self.lengths = lengths
        # zeros: what is masked has the weight 0, and 0 times nan is nan
        self.memory = [
            x.new_zeros(slots, x.shape[1], capacity, x.shape[3]) for x in (like.keys, like.values)
        ]
        self.is_initialized = True

    def fill(self, first: int, read: DynamicLayer, places: Sequence[Tensor]) -> None:
        """Copy what was read into the slots from this one on."""
        for memory, new in zip(self.memory, (read.keys, read.values), strict=True):
            tokens = new.transpose(1, 2).flatten(0, 1)
            for row, of_row in enumerate(places):
                own = tokens[of_row.to(tokens.device)].transpose(0, 1)
                memory[first + row, :, : len(of_row)] = own
                memory[first + row, :, len(of_row) :] = 0

    def move(self, source: int, target: int) -> None:
        """Put the row of one slot into another."""
        for memory in self.memory:
            memory[target] = memory[source]

    def update(
        self,
        key_states: Float[Tensor, "rows heads 1 width"],
        value_states: Float[Tensor, "rows heads 1 width"],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        rows = len(key_states)
        slots = torch.arange(rows, device=key_states.device)
        places = torch.tensor(self.lengths, device=key_states.device)
        for memory, new in zip(self.memory, (key_states, value_states), strict=True):
            memory[slots, :, places] = new[:, :, 0]
        time = self.get_seq_length() + 1
        keys, values = (memory[:rows, :, :time] for memory in self.memory)
        return keys, values

    def get_seq_length(self, *args: Any) -> int:
        return max(self.lengths)

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return self.get_seq_length() + 1, 0
