"""Find how a model decodes: with which cache, and whether rows of unequal length go together.

Names of the cache differ (``cache`` from transformers 5.24 on, ``past_key_values`` before,
``cache_params`` of Mamba), some take none, some caches cannot give a row up, and some models read
the padding on the left. A model that gets an argument it does not know answers without a word. So
every way is tried on two short rows, and used only if the logits are those of each row alone.
"""

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unlora.errors import is_out_of_memory
from unlora.evals.passes.slot_cache import SlotCache
from unlora.forward.architecture import output_embedding
from unlora.forward.capabilities import attends_by_rows
from unlora.forward.modes import agree, device_of, in_full, takes
from unlora.forward.packing import flat as flat_layout
from unlora.forward.packing import padded

CACHES = ("cache", "past_key_values", "cache_params")
PROMPTS, STEPS = (7, 5), 4  # tokens of the two rows that are tried, and steps; the first row leaves
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoding:
    """How a model may be asked for one token after another.

    Attributes:
        padding: rows of unequal length go together, padded on the left.
        cache: name of the argument; without one, all tokens are read again in every step.
        selects: rows that have ended may leave the cache.
        masks_past: what is in the cache is masked again in every step; a state that has left its
            padding out takes a mask of the new tokens only.
        slots: keys and values may be kept in a :class:`SlotCache`.
        flat: prompts may follow one another in one sequence; what all begin with is read once.
    """

    padding: bool = False
    cache: str | None = None
    selects: bool = False
    masks_past: bool = True
    slots: bool = False
    flat: bool = False

    def next_logits(
        self, lm: Any, ids: Int[Tensor, "rows new"], mask: Int[Tensor, "rows time"], cache: Any
    ) -> tuple[Float[Tensor, "rows vocab"], Any]:
        """The logits after the last token of each row, and the cache with these tokens.

        Args:
            ids: the tokens that are not in the cache, all where there is none.
            mask: 0 on padding.
        """
        new = ids.shape[1]
        if cache is None:  # padding that every row has; some mask nothing in a single row
            new -= int(mask.any(0).int().argmax())
        masked = mask if cache is not None and self.masks_past else mask[:, -new:]
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)[:, -new:]
        inputs = {
            "input_ids": ids[:, -new:],
            "attention_mask": masked,
            "position_ids": positions,
        }
        last = torch.arange(1, len(ids) + 1, device=ids.device) * new - 1
        return self._logits(lm, inputs, last, cache)

    def read_prompts(
        self, lm: Any, prompts: Sequence[Sequence[int]], pad_id: int, slots: SlotCache
    ) -> Float[Tensor, "rows vocab"]:
        """The logits after these prompts, each of which gets a slot.

        Raises:
            TypeError: what the model remembers does not go into slots.
        """
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        columns = torch.arange(int(lengths.max()))
        ids = torch.full((len(prompts), len(columns)), pad_id)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        mask = (columns < lengths[:, None]).long()
        device = device_of(lm)
        batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if self.flat:
            layout = flat_layout([batch], common=_common(prompts))
        else:  # padding comes after all that a token sees
            layout = padded(batch | {"attention_mask": torch.ones_like(ids).to(device)})
        rows = torch.arange(len(prompts), device=device)
        places = [
            layout.places(0, row, columns.to(device)[:length])
            for row, length in zip(rows, lengths.tolist(), strict=True)
        ]
        last = torch.stack([of_row[-1] for of_row in places])
        logits, read = self._logits(lm, dict(layout.inputs), last, None)
        if self.flat and not logits.amax(-1).isfinite().all():  # who is dead takes all along
            return replace(self, flat=False).read_prompts(lm, prompts, pad_id, slots)
        slots.add(read, places)
        return logits

    def next_in_slots(
        self, lm: Any, tokens: Sequence[int], slots: SlotCache
    ) -> Float[Tensor, "rows vocab"]:
        """The logits after one more token of every row in a slot."""
        device = device_of(lm)
        ids = torch.tensor(tokens, device=device)[:, None]
        positions = torch.tensor(slots.lengths, device=device)[:, None]
        mask = slots.mask.to(device=device, dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        logits, _ = self._logits(
            lm, inputs, torch.arange(len(tokens), device=device), slots.cache
        )  # fmt: skip
        slots.grow()
        return logits

    def _logits(
        self, lm: Any, inputs: dict[str, Any], places: Int[Tensor, " rows"], cache: Any
    ) -> tuple[Float[Tensor, "rows vocab"], Any]:
        """The logits at these places of the flattened input, and the cache."""
        if not takes(lm, "position_ids"):
            inputs.pop("position_ids", None)
        if self.cache is not None:
            inputs[self.cache] = cache

        def select(_module: nn.Module, args: Any) -> Any:
            states = args[0].flatten(0, 1)
            return (states[places.to(states.device)][:, None], *args[1:])

        handle = output_embedding(lm).register_forward_pre_hook(select)
        try:
            output = lm(**inputs, use_cache=self.cache is not None)
        finally:
            handle.remove()
        return in_full(output.logits[:, -1]), self.cache and getattr(output, self.cache, None)


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens with which all prompts begin; the last one of each is its own."""
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def select_rows(cache: Any, rows: Int[Tensor, " rows"]) -> None:
    """Leave only these rows in a cache.

    Its layers' ``batch_select_indices`` forgets the states of hybrid layers; reordering does not.
    """
    cache.reorder_cache(rows)


_KNOWN: WeakKeyDictionary[nn.Module, Decoding] = WeakKeyDictionary()


@torch.no_grad()
def decoding_of(lm: Any, pad_id: int) -> Decoding:
    """The fastest way to decode that gives the logits of each row alone.

    Args:
        lm: in evaluation mode.
    """
    if lm not in _KNOWN:
        _KNOWN[lm] = _found(lm, pad_id)
        _warn(lm, _KNOWN[lm])
    return _KNOWN[lm]


def _found(lm: Any, pad_id: int) -> Decoding:
    base = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
    taken = inspect.signature(base.forward).parameters
    cache = next((name for name in CACHES if name in taken), None)
    ways = [Decoding(padding=True)]
    if cache is not None:
        cached = [Decoding(True, cache, True), Decoding(True, cache), Decoding(False, cache)]
        unmasked = [replace(way, masks_past=False) for way in cached]
        flats = [True, False] if attends_by_rows(lm) else [False]
        slots = [replace(cached[0], slots=True, flat=flat) for flat in flats]
        ways = [*slots, *cached, *unmasked, *ways]
    trial = _Trial(lm, pad_id)
    return next((way for way in ways if trial.agrees(way)), Decoding())


def _warn(lm: Any, way: Decoding) -> None:
    base = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
    name = type(base).__name__
    if not way.padding:
        logger.warning(
            "%s does not tell padding from text: it generates one row at a time, which is slow",
            name,
        )
    if way.cache is None:
        logger.warning(
            "%s takes no cache that gives the same logits (%s): every new token reads its whole "
            "row again, which is slow", name, ", ".join(CACHES),
        )  # fmt: skip


class _Trial:
    """Two rows of unequal length, their next tokens, and the logits of each row alone."""

    def __init__(self, lm: Any, pad_id: int):
        self.lm, self.pad_id, self.device = lm, pad_id, device_of(lm)
        vocabulary = lm.get_input_embeddings().weight.shape[0]
        total = sum(PROMPTS) + 2 * STEPS
        ids = (torch.arange(1, 1 + total) * 7919 % vocabulary).to(self.device)
        self.rows = ids.split([length + STEPS for length in PROMPTS])
        self.expected = [
            self._plain(row)[length - 1 : -1]
            for row, length in zip(self.rows, PROMPTS, strict=True)
        ]
        gap = ids.new_full((PROMPTS[0] - PROMPTS[1],), pad_id)
        # what the second row would say if it read its padding as text
        self.wrong = self._plain(torch.cat((gap, self.rows[1])))[PROMPTS[0] - 1 : -1]

    def agrees(self, way: Decoding) -> bool:
        """Whether both rows have, step by step, the logits that each has alone."""
        try:
            if way.slots:
                first, second = self._in_slots(way)
            elif way.padding:
                first, second = self._together(way)
            else:
                first, second = (self._alone(way, number) for number in (0, 1))
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            return False
        return agree(self.expected[0][: len(first)].numpy(), first.numpy(), self.lm) and agree(
            self.expected[1].numpy(), second.numpy(), self.lm, self.wrong.numpy()
        )

    def _next(self, way: Decoding, *inputs: Any) -> tuple[Tensor, Any]:
        logits, cache = way.next_logits(self.lm, *inputs)
        if way.cache is not None and cache is None:
            raise TypeError(f"takes {way.cache}, but returns none")
        return logits, cache

    def _plain(self, row: Int[Tensor, " time"]) -> Float[Tensor, "time vocab"]:
        output = self.lm(
            input_ids=row[None], attention_mask=torch.ones_like(row)[None], use_cache=False
        )
        return in_full(output.logits[0]).cpu()

    def _alone(self, way: Decoding, number: int) -> Float[Tensor, "steps vocab"]:
        row, length = self.rows[number], PROMPTS[number]
        steps, cache = [], None
        for step in range(STEPS):
            seen = row[None, : length + step]
            new = seen if cache is None else seen[:, -1:]
            logits, cache = self._next(way, new, torch.ones_like(seen), cache)
            steps.append(logits[0])
        return torch.stack(steps).cpu()

    def _in_slots(self, way: Decoding) -> list[Float[Tensor, "steps vocab"]]:
        """The first row leaves after two steps, and the second takes its slot."""
        slots = SlotCache(2, max(PROMPTS) + STEPS)
        rows = [row.tolist() for row in self.rows]
        prompts = [row[:length] for row, length in zip(rows, PROMPTS, strict=True)]
        steps = [[x] for x in way.read_prompts(self.lm, prompts, self.pad_id, slots)]
        going = [0, 1]
        for step in range(1, STEPS):
            tokens = [rows[n][PROMPTS[n] + step - 1] for n in going]
            for n, logits in zip(going, way.next_in_slots(self.lm, tokens, slots), strict=True):
                steps[n].append(logits)
            if step == 1:
                going = slots.keep([1])
        return [torch.stack(logits).cpu() for logits in steps]

    def _together(self, way: Decoding) -> list[Float[Tensor, "steps vocab"]]:
        width = max(PROMPTS)
        rows = torch.full((2, width + STEPS), self.pad_id, device=self.device)
        mask = torch.zeros_like(rows)
        for n, row in enumerate(self.rows):
            rows[n, -len(row) :], mask[n, -len(row) :] = row, 1
        steps: list[list[Tensor]] = [[], []]
        going, cache = [0, 1], None
        for step in range(STEPS):
            seen = slice(0, width + step)
            ids = rows[going, seen]
            new = ids if cache is None else ids[:, -1:]
            logits, cache = self._next(way, new, mask[going, seen], cache)
            for k, n in enumerate(going):
                steps[n].append(logits[k])
            if step == 1 and (way.selects or cache is None):
                going = [1]
                if cache is not None:
                    select_rows(cache, torch.tensor(going, device=self.device))
        return [torch.stack(logits).cpu() for logits in steps]
