"""Attend row by row where all rows follow one another in one flat sequence without padding.

Linear layers see the tokens once, [1, tokens, width]: no padding, and what all rows begin with
stands there a single time. Attention alone is computed on rows: their queries, keys and values are
gathered, common beginning first, and attended to causally without a mask; the outputs go back.

    flat    S S A A A B B           S is what both rows begin with
    rows    S S A A A
            S S B B .
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SHORTEST = 0.7  # of the longest row with which a row is attended to; the rest is padding
CHANGES = ("sliding_window", "softcap", "s_aux", "position_bias")  # the sums that attention takes


@dataclass(frozen=True)
class Rows:
    """Where the tokens of a flat sequence stand in its rows, all rows' places in one line.

    Attributes:
        token: at each place; the first one where there is none.
        place: of each token; that in the first row of one that all rows begin with.
        shapes: number and length of rows that are attended to together.
        shared: the places of the common beginning in each row.
        own: whether ``place`` points to a place.
    """

    token: Int[Tensor, " places"]
    place: Int[Tensor, " tokens"]
    shapes: Sequence[tuple[int, int]]
    shared: Int[Tensor, "rows common"]
    own: Bool[Tensor, "places 1"]


def arrange(lengths: Sequence[int], common: int, device: torch.device) -> Rows:
    """The places of rows of these lengths, of which the first ``common`` tokens are the same.

    The flat sequence is the common beginning, then what is left of each row in turn.
    """
    own = torch.tensor(lengths).sub(common)
    begins = (own.cumsum(0) - own + common).tolist()
    tokens: list[int] = []
    places = [*range(common), *[0] * int(own.sum())]  # the first row begins where places do
    firsts: list[int] = []
    shapes: list[tuple[int, int]] = []
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    while order:
        longest = lengths[order[0]]
        together = [row for row in order if lengths[row] >= SHORTEST * longest]
        order = order[len(together) :]
        shapes.append((len(together), longest))
        for row in together:
            begin, end = begins[row], begins[row] + lengths[row] - common
            firsts.append(len(tokens))
            places[begin:end] = range(len(tokens) + common, len(tokens) + lengths[row])
            tokens += [*range(common), *range(begin, end), *[0] * (longest - lengths[row])]
    of_tokens = torch.tensor(places, device=device)
    shared = torch.tensor(firsts, device=device)[:, None] + torch.arange(common, device=device)
    own_places = torch.zeros(len(tokens), 1, dtype=torch.bool, device=device)
    own_places[of_tokens] = True
    return Rows(torch.tensor(tokens, device=device), of_tokens, shapes, shared, own_places)


def attend_by_rows() -> None:
    """Let transformers' sdpa attention take ``rows``; without them it stays as it is."""
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if not (isinstance(usual, partial) and usual.func is _attention):
        ALL_ATTENTION_FUNCTIONS["sdpa"] = partial(_attention, usual)


def _attention(
    usual: Callable[..., Any],
    module: nn.Module,
    query: Float[Tensor, "1 heads tokens width"],
    key: Float[Tensor, "1 groups tokens width"],
    value: Float[Tensor, "1 groups tokens width"],
    attention_mask: Tensor | None,
    *args: Any,
    rows: Rows | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of each row to itself.

    Raises:
        TypeError: this model's attention is another.
    """
    if rows is None:
        return usual(module, query, key, value, attention_mask, *args, **kwargs)
    changed = [name for name in CHANGES if kwargs.get(name) is not None]
    causal = kwargs.get("is_causal") is not False and getattr(module, "is_causal", True)
    if args or changed or not causal:
        raise TypeError(f"{type(module).__name__} does not attend by rows alone")
    heads, groups = query.shape[1], key.shape[1]
    q, k, v = (_places(x, rows) for x in (query, key, value))
    # on a CPU heads that share keys would go through another, slower kernel
    copies = 1 if query.device.type != "cpu" else heads // groups
    outputs = []
    sizes = [count * length for count, length in rows.shapes]
    for (count, _), *three in zip(rows.shapes, *(x.split(sizes) for x in (q, k, v)), strict=True):
        q_rows, k_rows, v_rows = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in three)
        if copies > 1:
            k_rows, v_rows = (x.repeat_interleave(copies, 1) for x in (k_rows, v_rows))
        output = F.scaled_dot_product_attention(
            q_rows, k_rows, v_rows, dropout_p=kwargs.get("dropout", 0.0), is_causal=True,
            scale=kwargs.get("scaling"), enable_gqa=k_rows.shape[1] < heads,
        )  # fmt: skip
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return _ToTokens.apply(torch.cat(outputs), rows).unsqueeze(0), None


def _places(
    x: Float[Tensor, "1 heads tokens width"], rows: Rows
) -> Float[Tensor, "places heads width"]:
    return _ToPlaces.apply(x.transpose(1, 2).squeeze(0), rows)


class _ToPlaces(torch.autograd.Function):
    """Each place's token; a token has one place, or one in every row."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return tokens.contiguous().index_select(0, rows.token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_places: Tensor) -> Any:
        rows = ctx.rows
        of_tokens = of_places.index_select(0, rows.place)
        count, common = rows.shared.shape
        if common and count > 1:
            of_shared = of_places.index_select(0, rows.shared.flatten())
            of_tokens[:common] = of_shared.unflatten(0, (count, common)).sum(0)
        return of_tokens, None


class _ToTokens(torch.autograd.Function):
    """Each token's place."""

    @staticmethod
    def forward(ctx: Any, places: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return places.index_select(0, rows.place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_tokens: Tensor) -> Any:
        rows = ctx.rows
        return of_tokens.index_select(0, rows.token).mul_(rows.own[..., None]), None
