"""Batch rows under a token budget, halved when memory runs out, shared out over processes."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from unlora.errors import InputError, is_out_of_memory

TOKENS_ON_CPU = 4096
NOTHING = -1  # in place of answers, why a process has none: all of them must stop
SHARE_OF_GPU = 0.5  # of what the weights leave, for the activations of a batch
Progress = Callable[[int], Any]
Item = TypeVar("Item")
Answer = TypeVar("Answer")
logger = logging.getLogger(__name__)
_SAID: ContextVar[list[str] | None] = ContextVar("said", default=None)


@dataclass(frozen=True)
class Budget:
    """How much goes through a model at once.

    Attributes:
        tokens: padding included; None lets :func:`found_budget` find it.
        rows: no more than these, where given.
    """

    tokens: int | None = None
    rows: int | None = None


def answer_all(
    items: Sequence[Item],
    sizes: Sequence[int],
    ask: Callable[[list[Item]], list[Answer]],
    model: nn.Module,
    *,
    budget: Budget,
    share: float = 1.0,
    apart: Callable[[Item], list[Item]] = lambda item: [item],
    progress: Callable[[list[Item]], Any] = lambda items: None,
) -> list[Answer]:
    """Ask about every item, in batches of similar size, and answer in the order of the items.

    Args:
        sizes: tokens of each item.
        ask: one batch -> its answers, in order.
        share: of the token budget, for questions that need more memory per token than others.
        apart: the parts of an item that can be asked about one by one; their answers are lists,
            and joined they are the answer to the item.
        progress: told the items that are done.

    Raises:
        InputError: a single item does not fit into memory.
    """
    tokens = max(1, int((budget.tokens or found_budget(model)) * share))
    batches = list(_batches(sizes, tokens, budget.rows))
    rank, processes = (0, 1) if needs_all_processes(model) else rank_and_size()
    by_index: dict[int, Answer] = {}
    pieces = 1  # that a batch comes in
    try:
        for batch in batches[rank::processes]:
            whole = len(batch)
            while batch:
                part = batch[: max(1, whole // pieces)]
                answers = _with_memory(ask, [items[i] for i in part])
                if answers is None and len(part) > 1:
                    pieces = -(-whole // (len(part) // 2))
                    _say(f"Memory ran out on {len(part)} rows; going on with half")
                    continue
                if answers is None:
                    answers = [_in_parts(items[part[0]], sizes[part[0]], ask, apart)]
                by_index |= zip(part, answers, strict=True)
                progress([items[i] for i in part])
                batch = batch[len(part) :]
    except InputError as error:
        if processes == 1:
            raise
        by_index = {NOTHING: str(error)}  # type: ignore[dict-item]
    if processes > 1:
        by_index = gathered(by_index)
    if NOTHING in by_index:
        raise InputError(str(by_index[NOTHING]))
    return [by_index[i] for i in range(len(items))]


@contextmanager
def halvings() -> Iterator[list[str]]:
    """What is said within of memory that ran out, for a manifest."""
    messages: list[str] = []
    before = _SAID.set(messages)
    try:
        yield messages
    finally:
        _SAID.reset(before)


def _say(words: str) -> None:
    logger.warning("%s", words)
    if (messages := _SAID.get()) is not None:
        messages.append(words)


def found_budget(model: Any) -> int:
    """Tokens that may go through a model at once, found from its size and the device's memory.

    It depends on no measurement, so that every process finds the same and batches are reproducible.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        return TOKENS_ON_CPU
    config = model.config.get_text_config()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    total = torch.cuda.get_device_properties(device).total_memory
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    # the widest layer's activations, and keys and values of all layers, in float32
    per_token = 4 * (8 * config.hidden_size + 3 * width + 2 * config.num_hidden_layers * 256)
    tokens = int(max(0, total - weights) * SHARE_OF_GPU / per_token)
    return max(1024, min(tokens, 1 << 16))


def rank_and_size() -> tuple[int, int]:
    """Which of how many processes this is."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gathered(answers: Mapping[int, Answer]) -> dict[int, Answer]:
    """What all processes found together, in every one of them."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, dict(answers))
    return {i: answer for part in parts for i, answer in part.items()}


def needs_all_processes(model: nn.Module) -> bool:
    """Whether every process must take part in every pass, because each holds a part of the weights.

    So it is under FSDP and under DeepSpeed's third stage; such rows are not shared out.
    """
    sharded = any(hasattr(p, "ds_id") or hasattr(p, "placements") for p in model.parameters())
    return sharded or any(hasattr(m, "_fsdp_wrapped_module") for m in model.modules())


def _batches(sizes: Sequence[int], tokens: int, rows: int | None) -> Iterator[list[int]]:
    """Longest first, so that memory runs out at once or never."""
    batch: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if batch and (len(batch) == rows or sizes[batch[0]] * (len(batch) + 1) > tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _in_parts(
    item: Item,
    size: int,
    ask: Callable[[list[Item]], list[Answer]],
    apart: Callable[[Item], list[Item]],
) -> Any:
    """The answer to one item that does not fit into memory as a whole."""
    parts = apart(item)
    joined = [_with_memory(ask, [part]) for part in parts] if len(parts) > 1 else [None]
    if any(part is None for part in joined):
        raise InputError(
            f"Memory ran out on a single row of {size} tokens. Set max_length of its data lower, "
            "or load the model in a smaller dtype."
        )
    return [answer for part in joined if part is not None for answer in part[0]]


def _with_memory(ask: Callable[[list[Item]], list[Answer]], batch: list[Item]) -> Any:
    """The answers, or None where memory ran out."""
    try:
        return ask(batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # here, and not in the except clause, the tensors of the failed pass are free
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
