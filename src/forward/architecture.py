"""Find the parts of a transformers model: its decoder, its layers, its output embedding."""

from typing import Any

from torch import nn

from unlora.errors import InputError


def output_embedding(model: nn.Module) -> nn.Module:
    """The vocabulary projection, under any wrapper.

    Raises:
        TypeError: the model has none, so it is not a causal language model.
    """
    while not hasattr(model, "get_output_embeddings") and hasattr(model, "module"):
        model = model.module
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise TypeError(f"{type(model).__name__} has no output embedding: not a causal LM")
    return head


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The stack of decoder layers, under any wrapper and of any architecture."""
    return _decoder(model)[2]


def check_layer(model: nn.Module, layer: int) -> None:
    """Raises InputError unless the model has a decoder layer of this number, counted from 0."""
    count = len(decoder_layers(model))
    if not 0 <= layer < count:
        raise InputError(
            f"trainer.method_args.layer is {layer}, but the model has layers 0 to {count - 1}. "
            f"A quarter of the depth is usual: trainer.method_args.layer={(count - 1) // 4}."
        )


def _config(model: nn.Module) -> Any:
    # DeepSpeed's wrapper has a config that is its own
    while not hasattr(getattr(model, "config", None), "get_text_config"):
        model = model.module
    return model.config


def _decoder(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """The module that holds the decoder layers, its attribute, and the layers."""
    depth = _config(model).get_text_config().num_hidden_layers
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return parent, name, child
    raise TypeError(f"{type(model).__name__} has no stack of {depth} decoder layers")
