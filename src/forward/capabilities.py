"""Probe which forward-pass optimisations leave a model's log-probs unchanged."""

import logging
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unlora.forward import IGNORE_INDEX
from unlora.forward.architecture import output_embedding
from unlora.forward.forward_pass import PLAIN, Way, ask_all
from unlora.forward.lm_head import factors
from unlora.forward.outputs import TokenLogps
from unlora.forward.packing import flat, packed
from unlora.forward.row_attention import attend_by_rows

LENGTHS = (7, 5)  # few: what is tried must not need more memory than training
SEEN = 1e-5  # of its logits a row may owe to the one before: experts are multiplied in groups
logger = logging.getLogger(__name__)


def found_way(model: nn.Module, device: torch.device) -> Way:
    """The best way that gives the numbers which the model gives row by row.

    Args:
        model: not wrapped, on its device, with all of its weights.
    """
    with _still(model), torch.no_grad():
        batch = _two_rows(model, device)
        alone = _logps(model, batch, PLAIN)
        chunks = _tried(lambda: _head_is_last(model, batch) and _agree(
            alone, _logps(model, batch, Way(chunks=True)), model
        ))  # fmt: skip
        rows = attends_by_rows(model) and _tried(
            lambda: _tells_rows_apart(model, batch, alone, Way(flat=True))
        )
        packs = rows or _tried(lambda: _tells_rows_apart(model, batch, alone, Way(packs=True)))
    for able, what in ((packs, "rows follow one another"), (chunks, "its head is asked in chunks")):
        if not able:
            logger.info("%s gives other numbers where %s; not done", type(model).__name__, what)
    return Way(packs=packs, chunks=chunks, flat=rows)


def _tried(does: Callable[[], bool]) -> bool:
    try:
        return does()
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return False  # some take no positions, or have their head elsewhere


def attends_by_rows(model: nn.Module) -> bool:
    """Whether all layers attend to the whole row, by torch's attention."""
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    attend_by_rows()
    return getattr(config, "_attn_implementation", "") == "sdpa" and kinds == {"full_attention"}


def _tells_rows_apart(
    model: nn.Module, batch: Mapping[str, Tensor], alone: Tensor, way: Way
) -> bool:
    # four rows, so that the sequences hold more than one each
    four = {name: torch.cat([tensor, tensor]) for name, tensor in batch.items()}
    logps = _logps(model, four, way)
    if not _agree(torch.cat([alone, alone]), logps, model):
        return False
    # rounding in a coarse dtype must be small beside what the second row would see of the first
    first, second = batch["input_ids"][0], batch["input_ids"][1, : LENGTHS[1]]
    run_on = torch.cat([first, second])[None]
    labels = torch.full_like(run_on, IGNORE_INDEX)
    labels[0, len(first) + 1 :] = second[1:]
    joined = {"input_ids": run_on, "attention_mask": torch.ones_like(run_on), "labels": labels}
    wrong = _logps(model, joined, PLAIN)
    right = alone[-len(wrong) :]
    seen = (logps[len(alone) - len(wrong) : len(alone)] - right).abs().mean()
    apart = bool(seen <= 0.2 * (wrong - right).abs().mean())
    return apart and _sees_no_row_before(model, batch, way)


def _sees_no_row_before(model: nn.Module, batch: Mapping[str, Tensor], way: Way) -> bool:
    """Whether the second row of a sequence does not tell which row stands before it.

    What agrees but for rounding may still see a little of it.
    """
    ids = batch["input_ids"]
    after = []
    for first in (ids[0], ids[0] // 2):
        pair = {**batch, "input_ids": torch.stack([first, ids[1]])}
        layout = flat([pair], common=0) if way.flat else packed([pair], width=1, single=True)
        begin = int(layout.offsets[0][1])
        logits = model(**layout.inputs, use_cache=False).logits[0]
        after.append(logits[begin : begin + LENGTHS[1]].float())
    former, other = after
    return bool((former - other).abs().max() <= SEEN * former.abs().max())


def _logps(model: nn.Module, batch: Mapping[str, Tensor], way: Way) -> Tensor:
    (answer,) = ask_all(model, [(TokenLogps, batch)], way=way)
    assert isinstance(answer, TokenLogps)
    return answer.token_logps


def _head_is_last(model: nn.Module, batch: Mapping[str, Tensor]) -> bool:
    """Whether the head is a product, and its numbers are the model's logits, unchanged."""
    head = output_embedding(model)
    weight = getattr(head, "weight", None)
    if weight is None or weight.is_meta or weight.dim() != 2:
        return False
    if factors(head, weight.new_zeros(0, weight.shape[-1])) is None:
        return False
    seen: list[Tensor] = []

    def stretch(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        seen.append(1000 * output)  # far enough for a cap to show
        return seen[-1]

    handle = head.register_forward_hook(stretch)
    try:
        inputs = {name: batch[name][:1, :2] for name in ("input_ids", "attention_mask")}
        logits = model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    return logits.shape == seen[-1].shape and bool((logits == seen[-1].to(logits)).all())


def _agree(expected: Tensor, actual: Tensor, model: nn.Module) -> bool:
    coarse = next(model.parameters()).dtype not in (torch.float32, torch.float64)
    allowed = 0.05 if coarse else 1e-4
    difference = (expected - actual).abs().nan_to_num(torch.inf, posinf=torch.inf).max()
    return bool(difference <= allowed * max(1.0, float(expected.abs().max())))


def _two_rows(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    vocabulary: int = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(1, 1 + sum(LENGTHS)) * 7919 % vocabulary
    longest = max(LENGTHS)
    rows = torch.zeros(2, longest, dtype=torch.long)
    mask, labels = torch.zeros_like(rows), torch.full_like(rows, IGNORE_INDEX)
    for n, part in enumerate(ids.split(LENGTHS)):
        rows[n, : len(part)], mask[n, : len(part)], labels[n, 1 : len(part)] = part, 1, part[1:]
    batch = {"input_ids": rows, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


@contextmanager
def _still(model: nn.Module) -> Any:
    """Evaluation mode for a while."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
