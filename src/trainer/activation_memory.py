"""Measure the activations of a forward pass on fake tensors; no memory is taken.

One decoder layer is run, so what a layer costs is known whatever its kind.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from unlora.forward.architecture import decoder_layers, output_embedding
from unlora.forward.fused_lora import keep_no_masks
from unlora.forward.lm_head import LOGITS_AT_ONCE, LOGITS_KEPT
from unlora.forward.outputs import Outputs, Padded, SequenceLogps, TokenLogps
from unlora.model.reference import POLICY
from unlora.trainer.largest_batch import Batch


def activation_bytes(model: nn.Module, depth: int, batch: Batch) -> tuple[int, int]:
    """What autograd keeps of one pass: all of it, and with gradient checkpointing.

    A checkpoint keeps what goes into each layer, and makes one layer again when its gradient is
    due.
    """
    layer, outside, carried = _of_one_layer(model, batch)
    return depth * layer + outside, depth * carried + layer + outside


class _Kept:
    """Bytes of the tensors that autograd keeps, each once: inside a decoder layer, and outside.

    Args:
        own: storages that are the model's.
    """

    def __init__(self, own: set[int]) -> None:
        self.inside = self.outside = self.carried = 0
        self._in_layer, self._own = False, own
        self._seen: dict[int, Any] = {}

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._seen and key not in self._own:
            self._seen[key] = storage  # a storage that is gone would give its number to the next
            if self._in_layer:
                self.inside += storage.nbytes()
            else:
                self.outside += storage.nbytes()
        return tensor

    def enter(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self._in_layer = True
        self.carried = (args[0] if args else kwargs["hidden_states"]).nbytes

    def leave(self, *_: Any) -> None:
        self._in_layer = False


def _of_one_layer(model: Any, batch: Batch) -> tuple[int, int, int]:
    """Bytes that are kept inside a decoder layer and outside of all, and those that go into one."""

    def select(_module: nn.Module, args: Any) -> Any:
        hidden, *rest = args
        scored = min(batch.scored, batch.rows * batch.tokens)
        return (hidden.flatten(0, 1)[:scored].unsqueeze(0), *rest)

    first, training = decoder_layers(model)[0], model.training
    with FakeTensorMode(allow_non_fake_inputs=True), _faked(model), _only(model, first):
        own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
        saved = _Kept(own)
        hooks = [
            first.register_forward_pre_hook(saved.enter, with_kwargs=True),
            first.register_forward_hook(saved.leave),
            output_embedding(model).register_forward_pre_hook(select),
        ]
        try:
            ids = torch.zeros(batch.rows, batch.tokens, dtype=torch.long)
            model.train()
            keep_no_masks(model, POLICY)
            with torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor):
                model(input_ids=ids, use_cache=False)
        finally:
            model.train(training)
            for hook in hooks:
                hook.remove()
    return saved.inside, saved.outside, saved.carried


@contextmanager
def _faked(model: nn.Module) -> Iterator[None]:
    """Fake tensors on a device in place of those on meta, where attention takes other ways."""
    stores = []
    made: dict[int, Any] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in list(store.items()):
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    made[id(tensor)] = (
                        nn.Parameter(fake, requires_grad=tensor.requires_grad)
                        if isinstance(tensor, nn.Parameter)
                        else fake
                    )
                stores.append((store, name, tensor))
                store[name] = made[id(tensor)]
    try:
        yield
    finally:
        for store, name, tensor in stores:
            store[name] = tensor


@contextmanager
def _only(model: nn.Module, layer: nn.Module) -> Iterator[None]:
    """Take all layers but this one away for a while."""
    layers = decoder_layers(model)
    parent = next(m for m in model.modules() if any(c is layers for c in m.children()))
    name = next(n for n, child in parent.named_children() if child is layers)
    setattr(parent, name, nn.ModuleList([layer]))
    try:
        yield
    finally:
        setattr(parent, name, layers)


def logit_bytes(views: Mapping[str, type], batches: Mapping[str, Batch], base: Any) -> int:
    """What there is of the vocabulary's size: logits, their float32, and log p, for each pass.

    Of the pass whose gradient is being made, its gradient is there as well.
    """
    head = output_embedding(base)
    vocabulary, width = head.weight.shape[0], head.weight.element_size()
    total, largest = 0, 0
    for view, kind in views.items():
        if kind not in (TokenLogps, Outputs, SequenceLogps, Padded):
            continue
        batch = batches[view.split("_")[1]]
        tokens = batch.rows * batch.tokens if kind is Padded else batch.scored
        policy = view.startswith("policy_")
        if not policy and kind is SequenceLogps:
            continue  # one number a row, found before the first step
        if kind is TokenLogps:
            total += 4 * min(tokens * vocabulary, LOGITS_KEPT) if policy else 0
            largest = max(largest, 4 * LOGITS_AT_ONCE)
            continue
        float32 = 4 if width != 4 else 0
        total += tokens * vocabulary * ((width if policy else 0) + float32 + 4)
        if policy:
            largest = max(largest, tokens * vocabulary * (4 + width))
    return total + largest
