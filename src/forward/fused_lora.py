"""Train linear layers with a LoRA adapter in one autograd function for all that read one input.

peft computes y = W x + s B A dropout(x) for each layer by itself, with a mask, a scaled product and
a sum as large as y. Here the query, key and value projections (and gate and up) share one mask and
one product with all their A, s goes into the product of rank r, B's is added in place, and what is
kept for the backward pass is x and A dropout(x): masks are made again.

The model stays peft's: in every other case than that of training one plain adapter on frozen
weights (evaluation, adapters off, merged, several active, DoRA, quantised weights, autocast, hooks
on a part of a layer) peft's own forward runs. The numbers are the same but for rounding.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unlora.forward.keyed_dropout import KeyedDropout, Mask

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # children of one module


def layers_by_input(model: nn.Module) -> list[list[LoraLayer]]:
    """Return the LoRA layers in order, those together that usually read the same input."""
    groups: dict[tuple[int, str], list[LoraLayer]] = {}
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, LoraLayer):
                leader = next((names[0] for names in SAME_INPUT if name in names), name)
                groups.setdefault((id(parent), leader), []).append(child)
    return list(groups.values())


def keep_no_masks(model: nn.Module, adapter: str) -> None:
    """Have layers that would be fused keep what they do in training, on a model that never trains.

    Args:
        model: in training mode; layers that would be fused lose their dropout.
    """
    for layer in (layer for group in layers_by_input(model) for layer in group):
        if type(layer) is LoraLinear and adapter in layer.lora_dropout:
            dropout = layer.lora_dropout[adapter]
            layer.lora_dropout[adapter] = nn.Identity()
            if not _is_plain(layer, adapter, layer.base_layer.weight):
                layer.lora_dropout[adapter] = dropout
    fuse_lora(model, adapter)


def fuse_lora(model: nn.Module, adapter: str) -> None:
    """Have this adapter's layers computed together where they are trained.

    Args:
        adapter: name of the only one that is trained.
    """
    for group in layers_by_input(model):
        plain = [
            layer
            for layer in group
            if type(layer) is LoraLinear
            and "forward" not in vars(layer)  # else it is another's, or fused already
        ]
        fused = FusedLayers(plain, adapter)
        for layer in plain:
            layer.forward = partial(fused.forward, layer)


class FusedLayers:
    """LoRA layers whose outputs are computed when the first of them is called.

    Whether the others are called with the same tensor is seen when they are; one that is not is
    computed by itself.
    """

    def __init__(self, layers: Sequence[LoraLinear], adapter: str):
        self.layers, self.adapter = list(layers), adapter
        self._input: tuple[Tensor, int] | None = None  # and its version
        self._outputs: dict[LoraLinear, Tensor] = {}

    def forward(self, layer: LoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what peft's ``forward`` of this layer would."""
        if args or kwargs or not _is_trained(x):
            self._input, self._outputs = None, {}
            return type(layer).forward(layer, x, *args, **kwargs)
        before, version = self._input or (None, 0)
        if x._version != version or before is not x:
            self._input, self._outputs = None, {}
        elif layer in self._outputs:
            return self._next(layer)
        fitting = [other for other in self.layers if _is_plain(other, self.adapter, x)]
        if layer not in fitting:
            return type(layer).forward(layer, x)
        dropout, mask = layer.lora_dropout[self.adapter], None
        fitting = [other for other in fitting if _drop_alike(dropout, other, self.adapter)]
        if isinstance(dropout, KeyedDropout):
            mask = dropout.mask(x.to(layer.lora_A[self.adapter].weight.dtype))
            if mask is None:
                return type(layer).forward(layer, x)
        outputs = _FusedLoRA.apply(
            mask, [other.scaling[self.adapter] for other in fitting], x,
            *_tensors(fitting, self.adapter),
        )  # fmt: skip
        self._input = x, x._version
        self._outputs |= zip(fitting, outputs, strict=True)
        return self._next(layer)

    def _next(self, layer: LoraLinear) -> Tensor:
        output = self._outputs.pop(layer)
        if not self._outputs:
            self._input = None
        return output


def _drop_alike(dropout: nn.Module, layer: LoraLinear, adapter: str) -> bool:
    """Whether a layer has the mask of this dropout, or as that one none."""
    masks = [
        (other.number, other.p, other.seed) if isinstance(other, KeyedDropout) else None
        for other in (dropout, layer.lora_dropout[adapter])
    ]
    return masks[0] == masks[1]


def _is_trained(x: Tensor) -> bool:
    return (
        torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.compiler.is_compiling()
    )


def _is_plain(layer: LoraLinear, adapter: str, x: Tensor) -> bool:
    """Whether a layer trains this adapter alone, as plain LoRA on frozen weights."""
    if not layer.training or layer.disable_adapters or layer.merged:
        return False
    if [name for name in layer.active_adapters if name in layer.lora_A] != [adapter]:
        return False
    dropout = layer.lora_dropout[adapter]
    base, a, b = layer.base_layer, layer.lora_A[adapter], layer.lora_B[adapter]
    return (
        adapter not in getattr(layer, "lora_variant", {})
        and all(type(module) is nn.Linear for module in (base, a, b))
        and not any(parameter.requires_grad for parameter in base.parameters())
        and x.dtype == base.weight.dtype
        and x.device == base.weight.device == a.weight.device
        and a.weight.dtype == b.weight.dtype
        and a.bias is b.bias is None
        and getattr(layer, "cast_input_dtype_enabled", True)
        and (isinstance(dropout, nn.Identity | KeyedDropout) or getattr(dropout, "p", 1) == 0)
        and not any(_is_hooked(module) for module in (base, a, b, dropout))
    )


def _is_hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks,
             module._backward_pre_hooks)  # fmt: skip
    return any(hooks) or "forward" in vars(module)


def _tensors(layers: Sequence[LoraLinear], adapter: str) -> Iterator[Tensor | None]:
    for layer in layers:
        yield layer.base_layer.weight
        yield layer.base_layer.bias
        yield layer.lora_A[adapter].weight
        yield layer.lora_B[adapter].weight


class _FusedLoRA(torch.autograd.Function):
    """y = W x + bias + s B A (mask * x) of each layer; tensors come as W, bias, A, B of each."""

    @staticmethod
    def forward(
        ctx: Any,
        mask: Mask | None,
        scales: Sequence[float],
        x: Float[Tensor, "*batch width"],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        weights, biases, downs, ups = (tensors[n::4] for n in range(4))
        a = torch.cat(downs)
        ranks = [len(down) for down in downs]
        low = _scaled(_masked(x, mask, a.dtype) @ a.T, scales, ranks, mask)
        outputs = []
        for w, bias, b, z in zip(weights, biases, ups, low.split(ranks, 1), strict=True):
            y = nn.functional.linear(x, w, bias)
            flat = y.view(-1, len(w))
            if y.dtype == z.dtype:
                flat.addmm_(z, b.T)
            else:  # rounded once, as peft does
                flat.copy_(torch.addmm(flat.to(z.dtype), z, b.T))
            outputs.append(y)
        ctx.mask, ctx.scales = mask, scales
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, low, a, *weights, *ups)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        x, low, a, *rest = ctx.saved_tensors
        weights, ups = rest[: len(upstream)], rest[len(upstream) :]
        ranks, of_low, of_x = [b.shape[1] for b in ups], torch.zeros_like(low), None
        of_ups: list[Tensor | None] = [None] * len(ups)
        halves = zip(low.split(ranks, 1), of_low.split(ranks, 1), strict=True)
        for n, (z, of_z) in enumerate(halves):
            if (of_y := upstream[n]) is None:
                continue
            of_y = of_y.flatten(0, -2)
            exact = of_y.to(low.dtype)
            of_z.copy_(exact @ ups[n])
            of_ups[n] = exact.T @ z
            if ctx.needs_input_grad[2]:
                of_x = of_y @ weights[n] if of_x is None else of_x.addmm_(of_y, weights[n])
        _scaled(of_low, ctx.scales, ranks, ctx.mask)
        if of_x is not None:
            through = of_low @ a
            of_x += through if ctx.mask is None else through.mul_(ctx.mask.factors())
            of_x = of_x.view_as(x)
        of_downs = (of_low.T @ _masked(x, ctx.mask, a.dtype)).split(ranks)
        of_tensors = [(None, None, *pair) for pair in zip(of_downs, of_ups, strict=True)]
        return (None, None, of_x, *(gradient for four in of_tensors for gradient in four))


def _masked(x: Tensor, mask: Mask | None, dtype: torch.dtype) -> Float[Tensor, "tokens width"]:
    read = x.flatten(0, -2).to(dtype)
    return read if mask is None else read * mask.factors()


def _scaled(
    low: Tensor, scales: Sequence[float], ranks: Sequence[int], mask: Mask | None
) -> Tensor:
    """Multiply each layer's columns by its scale, in place."""
    for z, scale in zip(low.split(ranks, 1), scales, strict=True):
        z.mul_(scale if mask is None else scale * mask.scale)
    return low
