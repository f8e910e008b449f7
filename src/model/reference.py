"""Use one set of base weights as the policy and as its reference.

The reference is the model without the last link of its lineage, so it is the same network with
other adapters switched on:

* a fresh adapter: the adapters before it, or none of them;
* an adapter whose training continues: a frozen twin of it, made by :func:`freeze_reference`.

A model that is trained in full has no adapter to switch; its reference is a frozen copy, made only
when an objective asks for one.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from unlora.forward.architecture import decoder_layers
from unlora.model.targets import patterns_are_checked

POLICY = "default"
REFERENCE = "reference"
START = "start"  # the frozen twin of an adapter that does not start from zero


@contextmanager
def as_reference(model: nn.Module, frozen: nn.Module | None = None) -> Iterator[nn.Module]:
    """Answer as the model was before unlearning: without gradients, in eval mode.

    Args:
        model: the policy, not wrapped for several devices.
        frozen: the copy that stands for the reference of a model without adapters.
    """
    if not isinstance(model, PeftModel):
        if frozen is None:
            raise TypeError("a model without adapters needs a frozen copy as its reference")
        with torch.no_grad():
            yield frozen
        return
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), switched(model, reference_adapters(model)):
            yield model
    finally:
        for module, training in modes.items():
            module.training = training


def reference_adapters(model: PeftModel) -> list[str]:
    """The adapters that are on when the model answers as its reference."""
    below = [name for name in model.active_adapters if name not in (POLICY, START)]
    return [*below, REFERENCE] if REFERENCE in model.peft_config else below


@contextmanager
def adapters_off(model: PeftModel) -> Iterator[None]:
    """The root model: every adapter switched off."""
    with switched(model, []):
        yield


@contextmanager
def last_link_off(model: PeftModel) -> Iterator[None]:
    """What a model that is only asked was before its last adapter was trained."""
    with switched(model, list(model.active_adapters)[:-1]):
        yield


@contextmanager
def switched(model: PeftModel, names: list[str]) -> Iterator[None]:
    """These adapters and no others are on."""
    # peft's own switches change requires_grad of the adapters on their way in and out, so the
    # flags are put back as they were; the gradient of a policy pass survives that
    active = list(model.active_adapters)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        if names:
            model.base_model.set_adapter(names)
            yield
        else:
            for layer in _tuner_layers(model):
                layer.enable_adapters(False)
            yield
    finally:
        if not names:
            for layer in _tuner_layers(model):
                layer.enable_adapters(True)
        model.base_model.set_adapter(active)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _tuner_layers(model: PeftModel) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def is_of(adapter: str, name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return "lora_" in name and f".{adapter}." in f"{name}."


def freeze_reference(model: PeftModel) -> None:
    """Keep a copy of the trained adapter to be the reference. Costs one adapter, not one model."""
    flags, active = {n: p.requires_grad for n, p in model.named_parameters()}, model.active_adapters
    with patterns_are_checked():
        model.add_adapter(REFERENCE, copy.deepcopy(model.peft_config[POLICY]))
    state = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in state.items():
            if is_of(POLICY, name):
                twin = f"{name}.".replace(f".{POLICY}.", f".{REFERENCE}.").removesuffix(".")
                state[twin].copy_(weight)
    model.base_model.set_adapter(active)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags.get(name, False))


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of a model that is trained in full, to be its reference. Costs a whole model."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def rest_above(model: nn.Module, layer: int) -> None:
    """Let everything above decoder layer ``layer`` rest: no gradient would reach it."""
    layers = decoder_layers(model)
    below = {id(p) for part in layers[: layer + 1] for p in part.parameters()}
    below |= {id(p) for p in model.get_input_embeddings().parameters()}
    for parameter in model.parameters():
        if id(parameter) not in below:
            parameter.requires_grad_(False)
