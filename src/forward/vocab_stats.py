"""Reduce hidden states over the vocabulary block by block; [tokens, vocab] never exists."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unlora.forward.lm_head import Factors
from unlora.forward.modes import in_full

TOKENS_AT_ONCE = 2048
BLOCK_ON_CPU = 1024  # words; such a block of logits stays in the processor's cache
LOGITS_AT_ONCE = 1 << 26  # elsewhere
LEAST = -1e15  # stands for -inf, so that 0 times it is 0
LEAST_LOGP = -1e4


def numbers_of(
    products: Factors, at: Int[Tensor, " scored"], labels: Int[Tensor, " scored"]
) -> Float[Tensor, "4 scored"]:
    """log p, greedy hit, and mean and variance of log p over the vocabulary, of scored tokens.

    Args:
        products: see :func:`unlora.forward.lm_head.factors`.
        at: of each scored token, which hidden state predicts it; ascending.
    """
    blocks = []
    count = len(products[0][0])
    for begin in range(0, count, TOKENS_AT_ONCE):
        bounds = torch.tensor([begin, begin + TOKENS_AT_ONCE], device=at.device)
        first, last = torch.searchsorted(at, bounds).tolist()
        some = [(states[begin : begin + TOKENS_AT_ONCE], words) for states, words in products]
        blocks.append(_numbers(some, at[first:last] - begin, labels[first:last]))
    return torch.cat(blocks, dim=1)


def _numbers(products: Factors, at: Tensor, labels: Tensor) -> Tensor:
    states = products[0][0]
    exact = torch.float64 if states.dtype == torch.float64 else torch.float32
    # in a coarse dtype several words may be the likeliest; greedy search takes the first of them
    ties = states.dtype not in (torch.float32, torch.float64)
    room = _Room(products)
    # of each block, of each state: small tensors that came and went would scatter the memory
    tops, sums, means, variances = states.new_empty(4, room.count, len(states), dtype=exact)
    target = states.new_zeros(len(at), dtype=exact)
    best = torch.zeros_like(at)
    highest = torch.full_like(tops[0], float("-inf"))
    for n, begin in enumerate(range(0, room.words, room.block)):
        logits = room.logits(begin).clamp_(min=LEAST)
        here = (labels >= begin) & (labels < begin + room.block)
        target[here] = logits[at[here], labels[here] - begin]
        torch.amax(logits, -1, out=tops[n])
        if ties:
            better = (tops[n] > highest)[at]
            best = torch.where(better, (logits.argmax(-1) + begin)[at], best)
        torch.maximum(highest, tops[n], out=highest)
        # from here on relative to the block's highest: small numbers keep their digits
        p = room.softmax(logits.sub_(tops[n][:, None]))
        torch.amax(p, -1, out=sums[n])
        torch.linalg.vecdot(p, logits, out=means[n])
        torch.linalg.vecdot(p, logits.sub_(means[n][:, None]).square_(), out=variances[n])
    height = tops - highest
    sums = height - sums.log_()
    lse = sums.logsumexp(0)
    weight = (sums - lse).exp_()
    means = means + height - lse
    mean = (weight * means).sum(0)
    var = (weight * (variances + (means - mean).square())).sum(0)
    hit = best == labels if ties else target >= highest[at]
    logp = (target - highest[at] - lse[at]).clamp(min=LEAST_LOGP)
    return torch.stack((logp, hit.to(exact), mean[at], var[at]))


def gradients_of(
    products: Factors, labels: Int[Tensor, " places"], share: Float[Tensor, " places"]
) -> list[Tensor]:
    """The gradient of the sum of share * -log p(label), for the states of each product.

    NaN where the logits are not finite.
    """
    room = _Room(products)
    lse = torch.full_like(share, float("-inf"))
    for begin in range(0, room.words, room.block):
        lse = torch.logaddexp(lse, room.logits(begin).logsumexp(-1))
    gradients = [torch.zeros_like(states) for states, _ in products]
    for begin in range(0, room.words, room.block):
        p = room.logits(begin).sub_(lse[:, None]).exp_()
        here = ((labels >= begin) & (labels < begin + room.block)).nonzero().squeeze(1)
        p[here, labels[here] - begin] -= 1
        p.mul_(share[:, None])
        for gradient, (_, words) in zip(gradients, products, strict=True):
            gradient += p.to(words.dtype) @ words[begin : begin + room.block]
    return gradients


@contextmanager
def before_the_head(
    head: nn.Module, row: Tensor, position: Tensor, *, whole: bool
) -> Iterator[list[Tensor]]:
    """Keep the hidden states of these places.

    Args:
        whole: the head sees them, and nothing else; otherwise it sees nothing.
    """
    states: list[Tensor] = []

    def select(_module: nn.Module, args: Any) -> Any:
        hidden, *rest = args
        here = hidden.device  # of several, with device_map="auto"
        states.append(hidden[row.to(here), position.to(here)])
        seen = states[0] if whole else states[0][:0]
        return (seen.unsqueeze(0), *rest)

    handle = head.register_forward_pre_hook(select)
    try:
        yield states
    finally:
        handle.remove()


class _Room:
    """Memory for one block of logits and one of probabilities, used over and over.

    Fresh memory for every block would take longer than the numbers in it.
    """

    def __init__(self, products: Factors):
        states, words = products[0]
        exact = torch.float64 if states.dtype == torch.float64 else torch.float32
        self.products, self.words = products, len(words)
        block = BLOCK_ON_CPU if states.device.type == "cpu" else LOGITS_AT_ONCE // len(states)
        self.block = min(block, self.words)
        self.count = -(-self.words // self.block)
        self.first, self.second = states.new_empty(2, len(states), self.block, dtype=exact)

    def logits(self, begin: int) -> Float[Tensor, "tokens block"]:
        """The logits of the words of one block."""
        (states, words), *adapters = self.products
        words = words[begin : begin + self.block]
        if len(words) == self.block and states.dtype == words.dtype == self.first.dtype:
            products = torch.mm(states, words.T, out=self.first)
        else:
            products = in_full(states @ words.T)
        for states, words in adapters:
            products.add_(states @ words[begin : begin + self.block].T)
        return products

    def softmax(self, logits: Float[Tensor, "tokens block"]) -> Float[Tensor, "tokens block"]:
        if logits.shape == self.second.shape:
            return torch.softmax(logits, -1, out=self.second)
        return logits.softmax(-1)


def numbers_from(
    logits: Float[Tensor, "places vocab"],
    at: Int[Tensor, " scored"],
    labels: Int[Tensor, " scored"],
) -> Float[Tensor, "4 scored"]:
    """The same, from logits that are there."""
    logps = in_full(logits).log_softmax(-1).clamp_(min=LEAST_LOGP)
    p = logps.exp()
    mean = torch.linalg.vecdot(p, logps)
    logp, hit = logps[at, labels], logps.argmax(-1)[at] == labels
    var = torch.linalg.vecdot(p, logps.sub_(mean[:, None]).square_())
    return torch.stack((logp, hit.to(logp.dtype), mean[at], var[at]))
