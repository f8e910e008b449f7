"""Decide whether gradient checkpointing is needed (docs/performance.md)."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PretrainedConfig

from unlora.forward.lm_head import LOGITS_AT_ONCE
from unlora.runs.machine import in_words, memory
from unlora.runs.run import PROGRAM
from unlora.trainer.largest_batch import Batch
from unlora.trainer.memory_estimate import Estimate

SHARE = 0.7  # of the memory: an estimate is off by a quarter at most, see docs/architecture.md
AUTO = "auto"


def is_auto(args: Mapping[str, Any]) -> bool:
    """Whether ``trainer.args`` leave it to the memory that is there."""
    wanted = args.get("activation_checkpointing")
    return (args.get("gradient_checkpointing") if wanted is None else wanted) == AUTO


def available_memory(device: torch.device | None = None) -> int | None:
    """Bytes that a training may take: of the GPU where there is one, else of this machine."""
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        return torch.cuda.mem_get_info(device)[0]
    free = memory()[1]
    share = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return None if free is None else max(free // share - PROGRAM, 0)


def decided(
    batches: Mapping[str, Batch],
    architecture: PretrainedConfig | None,
    estimate: Callable[[], Estimate],
    available: int | None,
) -> tuple[bool, str]:
    """Whether it is on, and why, as one sentence.

    Args:
        batches: the largest micro-batches, by part of the data.
        architecture: with it, a model that is small beside the memory is not estimated.
        estimate: what the training needs.
        available: bytes, where they are known.
    """
    if available is None:
        return True, "on, as the memory that is available is not known"
    there = f"{in_words(available)} are available"
    if architecture is not None and bound(batches, architecture) <= SHARE * available / 4:
        return False, f"off: the model is small, and {there}"
    try:
        needs = estimate()
    except Exception as error:  # of an architecture that cannot be tried without weights
        return True, f"on, as what is needed without it is not known ({error})"
    needed = needs.switched(False).total_bytes
    both = f"about {in_words(needed)} are needed without it, and {there}"
    return needed > SHARE * available, f"{'on' if needed > SHARE * available else 'off'}: {both}"


def bound(batches: Mapping[str, Batch], architecture: PretrainedConfig) -> float:
    """More bytes than a plain transformer needs for a step of these batches, without a look at it.

    Infinite for one that is not plain.
    """
    text = architecture.get_text_config()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = [getattr(text, name, None) for name in (*names, "vocab_size")]
    experts = any("expert" in key and value for key, value in vars(text).items())
    if experts or not all(isinstance(size, int) for size in sizes):
        return float("inf")
    width, inner, layers, heads, words = (int(size) for size in sizes if size is not None)
    weights = layers * (8 * width * width + 3 * width * inner) + 2 * words * width
    tokens = sum(batch.rows * batch.tokens for batch in batches.values())
    longest = max((batch.tokens for batch in batches.values()), default=0)
    activations = (
        layers * tokens * (60 * width + 20 * inner + 3 * heads * longest) + 4 * tokens * words
    )
    return 4.0 * (6 * weights + activations + 2 * LOGITS_AT_ONCE)
