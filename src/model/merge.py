"""Merge adapters into the weights they stand on, or take them off."""

from collections.abc import Iterable

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel


def merge_adapters(model: nn.Module) -> PreTrainedModel:
    """Add every adapter that is on to the weights, in float32, and return the plain model.

    A head that shares its weights with the input embedding gets its own copy first: an adapter on
    the one must not change the other.
    """
    if not isinstance(model, PeftModel):
        return model
    _untie(model)
    for layer in lora_layers(model.modules()):
        weight = adapted_weight(layer)
        stored = weight.dtype
        weight.data = weight.data.float()
        layer.merge()
        weight.data = weight.data.to(stored)
    for module in list(model.modules()):
        if isinstance(module, TrainableTokensWrapper):
            module.token_adapter.merge()
    plain = without_adapters(model)
    if plain.get_output_embeddings().weight is not plain.get_input_embeddings().weight:
        plain.config.tie_word_embeddings = False
        plain.config.get_text_config().tie_word_embeddings = False
    return plain


@torch.no_grad()
def share_left_by_rounding(model: PeftModel) -> float:
    """Of what the adapters add to the weights, the share that is left where the sum is rounded.

    What is smaller than half a step of a weight's dtype is lost. The answers keep more than this.
    """
    left = added = 0.0
    for layer in lora_layers(model.modules()):
        weight = adapted_weight(layer)
        deltas = [layer.get_delta_weight(n).float() for n in model.active_adapters if n in layer.r]
        if not deltas or not weight.dtype.is_floating_point:
            continue
        delta, before = torch.stack(deltas).sum(0), weight.float()
        rounded = (before + delta).to(weight.dtype).float() - before
        left += (rounded * delta).sum().item()
        added += delta.square().sum().item()
    return left / added if added else 1.0


def without_adapters(model: PeftModel) -> PreTrainedModel:
    """The plain model below, with nothing left of the adapters that were on it."""
    base = model.base_model.unload()
    # a later adapter would join those that these still name
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        vars(base).pop(attribute, None)
    return base


def _untie(model: PeftModel) -> None:
    """Part a head from the input embedding where an adapter is on one of them."""
    both = model.get_output_embeddings(), model.get_input_embeddings()
    head, embedding = (m.get_base_layer() if isinstance(m, LoraLayer) else m for m in both)
    if lora_layers(both) and getattr(head, "weight", 0) is getattr(embedding, "weight", 1):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


@torch.no_grad()
def share_lost_by_rounding(model: PeftModel, dtype: torch.dtype) -> float:
    """Of the weights that the adapters change, the share that a dtype rounds to what it was."""
    lost = changed = 0
    for layer in lora_layers(model.modules()):
        weight = adapted_weight(layer).float()
        deltas = [layer.get_delta_weight(n).float() for n in model.active_adapters if n in layer.r]
        if not deltas:
            continue
        delta = torch.stack(deltas).sum(0)
        changed += int((delta != 0).sum())
        lost += int(((delta != 0) & ((weight + delta).to(dtype) == weight.to(dtype))).sum())
    return lost / changed if changed else 0.0


def lora_layers(modules: Iterable[nn.Module]) -> list[LoraLayer]:
    """Those of some modules that have a LoRA adapter."""
    return [module for module in modules if isinstance(module, LoraLayer)]


def adapted_weight(layer: LoraLayer) -> nn.Parameter:
    """The weight that the adapters of a layer are added to."""
    base = layer.get_param() if hasattr(layer, "get_param") else layer.get_base_layer().weight
    weight: nn.Parameter = base
    return weight
