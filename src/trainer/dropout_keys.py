"""Key an adapter's dropout by row, so that it does not depend on how rows are batched."""

import logging
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from unlora.forward.fused_lora import layers_by_input
from unlora.forward.keyed_dropout import KeyedDropout, keep_keys
from unlora.model.reference import POLICY

logger = logging.getLogger(__name__)


def key_dropout(model: nn.Module, seed: int) -> bool:
    """Put :class:`KeyedDropout` in place of peft's, in the adapter that is trained.

    Frozen adapters below it are a part of the model and drop nothing.

    Returns:
        Whether there is any.
    """
    if not isinstance(model, PeftModel):
        return False
    inputs = layers_by_input(model)
    keyed = False
    for number, layer in ((n, layer) for n, layers in enumerate(inputs) for layer in layers):
        for name, dropout in list(layer.lora_dropout.items()):
            if not isinstance(dropout, nn.Dropout) or dropout.p == 0:
                continue
            if name == POLICY:
                layer.lora_dropout[name] = KeyedDropout(dropout.p, number, len(inputs), seed)
                keyed = True
            else:
                layer.lora_dropout[name] = nn.Identity()
    return keyed


def draws_numbers(model: nn.Module) -> bool:
    """Whether a training pass draws random numbers: dropout of the model's own, or unkeyed."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return bool(getattr(text, "attention_dropout", 0)) or any(
        isinstance(module, nn.Dropout) and module.p > 0 and not isinstance(module, KeyedDropout)
        for module in model.modules()
    )


class KeepKeys(TrainerCallback):
    """Gradient checkpointing computes layers again with the dropout of the first time."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        keep_keys(model)
