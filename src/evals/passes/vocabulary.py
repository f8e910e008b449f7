"""What a vocabulary says of hidden states, block by block: [tokens, vocabulary] never exists."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from unlora.evals.passes.asking import in_full

TOKENS_AT_ONCE = 2048
BLOCK_ON_CPU = 1024  # words; such a block of logits stays in the processor's cache
LOGITS_AT_ONCE = 1 << 26  # elsewhere
LEAST = -1e15  # stands for -inf, so that 0 times it is 0
LEAST_LOGP = -1e4
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
    found = list(below)
    for name in head.active_adapters:
        if name not in head.lora_A:
            continue
        if name in getattr(head, "lora_variant", {}) or head.lora_B[name].bias is not None:
            return None
        a, b = head.lora_A[name].weight, head.lora_B[name].weight
        found.append(((hidden.to(a.dtype) @ a.T) * head.scaling[name], b))
    return found


def numbers_of(
    products: Factors, at: Int[Tensor, " scored"], labels: Int[Tensor, " scored"]
) -> Float[Tensor, "4 scored"]:
    """log p, greedy hit, and mean and variance of log p over the vocabulary, of scored tokens.

    Args:
        products: see :func:`factors`.
        at: of each scored token, which hidden state predicts it; ascending.
    """
    found = []
    count = len(products[0][0])
    for begin in range(0, count, TOKENS_AT_ONCE):
        bounds = torch.tensor([begin, begin + TOKENS_AT_ONCE], device=at.device)
        first, last = torch.searchsorted(at, bounds).tolist()
        some = [(states[begin : begin + TOKENS_AT_ONCE], words) for states, words in products]
        found.append(_numbers(some, at[first:last] - begin, labels[first:last]))
    return torch.cat(found, dim=1)


def _numbers(products: Factors, at: Tensor, labels: Tensor) -> Tensor:
    states, words = products[0]
    exact = torch.float64 if states.dtype == torch.float64 else torch.float32
    # in a coarse dtype several words may be the likeliest; greedy search takes the first of them
    ties = states.dtype not in (torch.float32, torch.float64)
    tops: list[Tensor] = []
    sums: list[Tensor] = []
    means: list[Tensor] = []
    variances: list[Tensor] = []
    target = states.new_zeros(len(at), dtype=exact)
    best = torch.zeros_like(at)
    block = BLOCK_ON_CPU if states.device.type == "cpu" else LOGITS_AT_ONCE // len(states)
    room = _Room(len(states), min(block, len(words)), exact, states.device)
    for begin in range(0, len(words), block):
        logits = room.logits(products, begin, begin + block).clamp_(min=LEAST)
        here = (labels >= begin) & (labels < begin + block)
        target[here] = logits[at[here], labels[here] - begin]
        top = logits.amax(-1)
        if ties:
            likeliest = logits.argmax(-1) + begin
            higher = top > torch.stack(tops).amax(0) if tops else torch.ones_like(top).bool()
            best = likeliest[at] if not tops else torch.where(higher[at], likeliest[at], best)
        # from here on relative to the block's highest: small numbers keep their digits
        p = room.softmax(logits.sub_(top[:, None]))
        mean = torch.linalg.vecdot(p, logits)
        tops.append(top)
        sums.append(-p.amax(-1).log())
        means.append(mean)
        variances.append(torch.linalg.vecdot(p, logits.sub_(mean[:, None]).square_()))
    highest = torch.stack(tops).amax(0)
    height = torch.stack(tops) - highest
    lse = (height + torch.stack(sums)).logsumexp(0)
    weight = (height + torch.stack(sums) - lse).exp()
    by_block = height + torch.stack(means) - lse
    mean = (weight * by_block).sum(0)
    var = (weight * (torch.stack(variances) + (by_block - mean).square())).sum(0)
    hit = best == labels if ties else target >= highest[at]
    logp = (target - highest[at] - lse[at]).clamp(min=LEAST_LOGP)
    return torch.stack((logp, hit.to(exact), mean[at], var[at]))


class _Room:
    """Memory for one block of logits and one of probabilities, used over and over.

    Fresh memory for every block would take longer than the numbers in it.
    """

    def __init__(self, tokens: int, block: int, exact: torch.dtype, device: torch.device):
        self.block = block
        self.first, self.second = (
            torch.empty(tokens, block, dtype=exact, device=device) for _ in range(2)
        )

    def logits(self, products: Factors, begin: int, end: int) -> Float[Tensor, "tokens block"]:
        """The logits of these words."""
        (states, words), *adapters = products
        words = words[begin:end]
        if len(words) == self.block and states.dtype == words.dtype == self.first.dtype:
            found = torch.mm(states, words.T, out=self.first)
        else:
            found = in_full(states @ words.T)
        for states, words in adapters:
            found.add_(states @ words[begin:end].T)
        return found

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
