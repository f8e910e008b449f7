"""Compute token log-probs from hidden states without materialising [tokens, vocab] logits."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LOGITS_AT_ONCE = 1 << 23  # of a chunk of tokens
LOGITS_AT_ONCE_ON_GPU = 1 << 26
LOGITS_KEPT = 1 << 25  # for the backward pass; what is above that is computed a second time
LOGITS_KEPT_ON_GPU = 1 << 27
Factors = Sequence[tuple[Tensor, Tensor]]


def factors(head: nn.Module, hidden: Float[Tensor, "tokens width"]) -> Factors | None:
    """The head's logits as a sum of products, states [tokens, k] times words [vocabulary, k].

    Adapters on the head are products of their own. None for a head of another kind.
    """
    if type(head) is nn.Linear and head.bias is None:
        return [(hidden, head.weight)]
    if not isinstance(head, LoraLinear) or head.merged:
        return None
    below = factors(head.get_base_layer(), hidden)
    if below is None or head.disable_adapters:
        return below
    products = list(below)
    for name in head.active_adapters:
        if name not in head.lora_A:
            continue
        if name in getattr(head, "lora_variant", {}) or head.lora_B[name].bias is not None:
            return None
        a, b = head.lora_A[name].weight, head.lora_B[name].weight
        read = head.lora_dropout[name](hidden.to(a.dtype))
        products.append(((read @ a.T) * head.scaling[name], b))
    return products


def token_logps(products: Factors, labels: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """log p(label) in nats of each state, from the products of :func:`factors`.

    The same numbers and gradients as ``log_softmax`` of the logits, a chunk of tokens at a time:
    float32 logits exist once, and become their own gradients in place. Of more than
    ``LOGITS_KEPT`` numbers the rest is computed again in the backward pass. Autocast has no say: a
    policy is asked outside of it, and a reference within must say the same.
    """
    tensors = [tensor for pair in products for tensor in pair]
    return _TokenLogps.apply(torch.is_grad_enabled(), labels, *tensors)


class _TokenLogps(torch.autograd.Function):
    """Tensors come as states, words, states, words, ..."""

    @staticmethod
    def forward(ctx: Any, keeps: bool, labels: Tensor, *tensors: Tensor) -> Tensor:
        states = tensors[0]
        on_cpu = states.device.type == "cpu"
        room = LOGITS_AT_ONCE if on_cpu else LOGITS_AT_ONCE_ON_GPU
        chunk = max(1, room // len(tensors[1]))
        keeps = keeps and any(ctx.needs_input_grad)
        room = (LOGITS_KEPT if on_cpu else LOGITS_KEPT_ON_GPU) if keeps else 0
        logps, lses, saved = [states.new_zeros(0, dtype=_exact(states))], [], {}
        for begin in range(0, len(labels), chunk):
            end = begin + chunk
            logits = _logits(tensors, begin, end)
            lse = logits.logsumexp(-1)
            logps.append(logits.gather(1, labels[begin:end, None]).squeeze(1) - lse)
            lses.append(lse)
            if logits.numel() <= room:
                room -= logits.numel()
                saved[begin] = logits
            del logits
        # what is kept is ours alone, so it need not go through save_for_backward
        ctx.kept, ctx.lses, ctx.chunk = saved, lses, chunk
        ctx.save_for_backward(labels, *tensors)
        return torch.cat(logps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        labels, *tensors = ctx.saved_tensors
        share = upstream[0]
        wanted = ctx.needs_input_grad[2:]
        grads = [torch.zeros_like(t) if w else None for t, w in zip(tensors, wanted, strict=True)]
        # the gradient of words is a sum over chunks, which coarse numbers would round each time
        grads[1::2] = [f if f is None else f.to(_exact(f)) for f in grads[1::2]]
        saved, ctx.kept = ctx.kept, None
        if saved is None:
            raise RuntimeError("The gradient of these log-probabilities can be taken only once.")
        for n, begin in enumerate(range(0, len(labels), ctx.chunk)):
            end = begin + ctx.chunk
            logits = saved.pop(begin) if begin in saved else _logits(tensors, begin, end)
            # d log p(y) / d logits = (1 at y) - p
            slope = logits.sub_(ctx.lses[n][:, None]).exp_().mul_(-share[begin:end, None])
            slope.scatter_add_(1, labels[begin:end, None], share[begin:end, None].to(slope.dtype))
            for i in range(0, len(tensors), 2):
                states, words = tensors[i], tensors[i + 1]
                with torch.autocast(states.device.type, enabled=False):
                    of_states, of_words = grads[i], grads[i + 1]
                    down = slope.to(states.dtype)
                    if of_states is not None:
                        of_states[begin:end] = down @ words.to(states.dtype)
                    if of_words is not None and of_words.dtype == words.dtype:
                        of_words.addmm_(down.T.to(words.dtype), states[begin:end].to(words.dtype))
                    elif of_words is not None:
                        of_words += down.T.to(words.dtype) @ states[begin:end].to(words.dtype)
            del logits, slope
        gradients = [f if f is None else f.to(t) for f, t in zip(grads, tensors, strict=True)]
        return (None, None, *gradients)


def _logits(tensors: Sequence[Tensor], begin: int, end: int) -> Float[Tensor, "chunk vocab"]:
    """Float32 logits of some of the states (float64 of float64 states)."""
    logits = None
    exact = _exact(tensors[0])
    with torch.autocast(tensors[0].device.type, enabled=False):
        for states, words in zip(tensors[::2], tensors[1::2], strict=True):
            some, words = states[begin:end], words.to(states.dtype)
            if logits is None:
                logits = (some @ words.T).to(exact)
            elif states.dtype == exact:
                logits.addmm_(some, words.T)
            else:
                logits.add_(some @ words.T)
    assert logits is not None
    return logits


def _exact(states: Tensor) -> torch.dtype:
    return torch.float64 if states.dtype == torch.float64 else torch.float32
