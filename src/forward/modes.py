"""Switch modes, caches and dtypes for a pass, and switch them back."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode it was in.

    In training with ``bf16`` the forward pass runs under autocast. An answer is that of the weights
    themselves, as it will be once they are saved.
    """
    modes = [(module, module.training) for module in model.modules()]
    under_autocast = vars(model).get("forward") if hasattr(model, "_original_forward") else None
    if under_autocast is not None:
        model.forward = model._original_forward
    model.eval()
    try:
        yield
    finally:
        if under_autocast is not None:
            model.forward = under_autocast
        for module, training in modes:
            module.training = training


def unwrapped(model: Any) -> Any:
    """The model inside a wrapper that only matters for gradients, as DDP's."""
    while not hasattr(model, "get_output_embeddings") and hasattr(model, "module"):
        model = model.module
    return model


def device_of(model: Any) -> torch.device:
    """Where the input goes; under a device map the model has several devices."""
    return model.get_input_embeddings().weight.device


def takes(model: Any, argument: str) -> bool:
    """Whether the forward pass of the model, below any adapters, has this argument."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return argument in inspect.signature(base.forward).parameters


def in_full(logits: Tensor) -> Tensor:
    """Numbers that can be summed over a vocabulary: float32, or float64 where they are that."""
    return logits if logits.dtype == torch.float64 else logits.float()


def agree(
    expected: np.ndarray, actual: np.ndarray, lm: nn.Module, wrong: np.ndarray | None = None
) -> bool:
    """Whether logits or log-probabilities are these, but for rounding in the dtype of the weights.

    Args:
        wrong: what they would be if the model did not do what is asked; where rounding is coarse
            they must be much nearer to what is expected than to that.
    """
    coarse = next(lm.parameters()).dtype not in (torch.float32, torch.float64)
    allowed = 0.05 if coarse else 1e-4  # some attention takes its softmax in float32 always
    finite = np.isfinite(expected)
    if (finite != np.isfinite(actual)).any():
        return False
    difference = np.abs(actual[finite] - expected[finite])
    if not len(difference):
        return True  # a dead model is as dead in every way
    if difference.max() > allowed * max(1.0, float(np.abs(expected[finite]).max())):
        return False
    if wrong is None or not coarse:
        return True
    return bool(difference.mean() <= 0.2 * np.abs(wrong[finite] - expected[finite]).mean())
