"""Find how a model decodes: with which cache, and whether rows of unequal length go together.

Names of the cache differ (``cache`` from transformers 5.24 on, ``past_key_values`` before,
``cache_params`` of Mamba), some take none, some caches cannot give a row up, and some models read
the padding on the left. A model that gets an argument it does not know answers without a word. So
every way is tried on two short rows, and used only if the logits are those of each row alone.
"""

import inspect
import logging
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unlora.errors import is_out_of_memory
from unlora.forward.architecture import output_embedding
from unlora.forward.modes import agree, device_of, in_full, takes

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
    """

    padding: bool = False
    cache: str | None = None
    selects: bool = False
    masks_past: bool = True

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
        inputs = {"input_ids": ids[:, -new:], "attention_mask": masked}
        if takes(lm, "position_ids"):
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_(min=0)[:, -new:]
        if self.cache is not None:
            inputs[self.cache] = cache
        handle = output_embedding(lm).register_forward_pre_hook(
            lambda _module, args: (args[0][:, -1:], *args[1:])
        )
        try:
            output = lm(**inputs, use_cache=self.cache is not None)
        finally:
            handle.remove()
        return in_full(output.logits[:, -1]), self.cache and getattr(output, self.cache, None)


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
        ways = [*cached, *(replace(way, masks_past=False) for way in cached), *ways]
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
            first, second = (
                self._together(way) if way.padding else map(self._alone, [way] * 2, (0, 1))
            )
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
