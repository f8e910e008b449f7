"""Run the forward passes that give outputs: as few as can be, and no longer than needed."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unlora.forward import IGNORE_INDEX
from unlora.forward.architecture import _config, _decoder, output_embedding
from unlora.forward.keyed_dropout import TokenKeys, keys_of, narrow, token_keys
from unlora.forward.lm_head import factors, token_logps
from unlora.forward.modes import in_full
from unlora.forward.outputs import GivenLogps, Hidden, Outputs, Padded, ScoredTokens, TokenLogps
from unlora.forward.packing import Layout, flat, packed, padded


@dataclass(frozen=True)
class Way:
    """How a model may be asked; the answers are the same in every way.

    Attributes:
        packs: rows may follow one another in a sequence, see ``unlora.forward.packing``.
        flat: they may all follow one another in one, each attended to by itself, see
            ``unlora.forward.row_attention``.
        chunks: logits are what the output embedding says and no more, so that log-probabilities
            can be had a chunk of tokens at a time, see ``unlora.forward.lm_head``.
        common: number of tokens with which every row of the data begins.
    """

    packs: bool = False
    chunks: bool = False
    flat: bool = False
    common: int = 0


Batch = Mapping[str, Tensor]
Answer = TokenLogps | Outputs | Hidden
PLAIN = Way()


def ask(model: nn.Module, batch: Batch) -> Outputs:
    """One forward pass; only scored positions reach the vocabulary projection.

    Args:
        model: a causal LM, wrapped or not (peft, DDP, ...).
        batch: int64 [batch time] ``input_ids``, ``attention_mask`` and ``labels``, where labels
            are ``IGNORE_INDEX`` on everything that is not to be scored. The first position of a
            row has no prediction and is never scored. Padding is on the right.
    """
    (answer,) = ask_all(model, [(Outputs, batch)])
    assert isinstance(answer, Outputs)
    return answer


def ask_all(
    model: nn.Module,
    questions: Sequence[tuple[type, Batch]],
    *,
    layer: int | None = None,
    way: Way = PLAIN,
) -> list[Answer]:
    """Several questions to one model, in one forward pass if the way packs.

    Args:
        questions: ``Outputs``, ``TokenLogps`` or ``Hidden``, of a batch; all or none ``Hidden``.
            Where a batch has a ``key`` of each row, dropout goes by it, and in the common
            beginning by ``beginning``.
        layer: that ``Hidden`` looks at, counted from 0; the pass ends there.
    """
    if not (way.packs or way.flat) and len(questions) > 1:
        return [ask_all(model, [question], layer=layer, way=way)[0] for question in questions]
    batches = [batch for _, batch in questions]
    if way.flat:
        layout = flat(batches, common=way.common)
    elif way.packs:
        config = _config(model)
        flash = str(getattr(config, "_attn_implementation", "")).startswith("flash")
        layout = packed(batches, width=config.get_text_config().hidden_size, single=flash)
    else:
        layout = padded(batches[0])
    scored = [_scored(batch) for batch in batches]
    places = [layout.places(n, tokens.row, at) for n, (tokens, at) in enumerate(scored)]
    kinds = [kind for kind, _ in questions]
    keys = _keys(batches, layout, way)
    if Hidden in kinds:
        assert layer is not None and all(kind is Hidden for kind in kinds)
        return _states(model, layout, layer, scored, keys)
    projected = [kind is Outputs or not way.chunks for kind in kinds]
    with token_keys(keys), _before_the_head(model, places, projected) as selected:
        logits = _forward(model, layout.inputs).squeeze(0)
    sizes = [len(states) for states, whole in zip(selected, projected, strict=True) if whole]
    # the gradient of a part alone would be copied into one of the whole
    logits_of = iter(logits.split(sizes) if len(sizes) > 1 else [logits])
    head = output_embedding(model)
    answers: list[Answer] = []
    for whole, states, (tokens, _), positions in zip(
        projected, selected, scored, places, strict=True
    ):
        # a module takes its input to its own device itself
        here = states.device if whole else head.weight.device
        moved = tokens.labels.to(here), tokens.row.to(here), tokens.rows
        if whole:
            answers.append(Outputs(*moved, in_full(next(logits_of))))
            continue
        with token_keys(keys and keys.select(positions)):
            products = factors(head, states.to(here))
        assert products is not None  # so it was when the way was found
        answers.append(GivenLogps(*moved, token_logps(products, moved[0])))
    return answers


def scored_tokens(batch: Batch) -> ScoredTokens:
    """Which tokens :func:`ask` would predict; costs no pass."""
    return _scored(batch)[0]


def ask_padded(model: nn.Module, batch: Batch, *, way: Way = PLAIN) -> Padded:
    """One forward pass that projects every position to the vocabulary."""
    layout = padded(batch)
    with token_keys(_keys([batch], layout, way)):
        logits = _forward(model, layout.inputs).float()
    return Padded(logits, batch["labels"].to(logits.device))


def _states(
    model: nn.Module,
    layout: Layout,
    layer: int,
    scored: Sequence[tuple[ScoredTokens, Tensor]],
    keys: TokenKeys | None,
) -> list[Answer]:
    nothing = [before[:0] for _, before in scored]
    with ExitStack() as stack:
        stack.enter_context(token_keys(keys))
        stack.enter_context(_before_the_head(model, nothing, [True] * len(nothing)))
        seen = stack.enter_context(_ending_after(model, layer))
        _forward(model, layout.inputs)
    states = seen[-1].flatten(0, 1)
    answers: list[Answer] = []
    for n, (tokens, before) in enumerate(scored):
        here, positions = states.device, layout.places(n, tokens.row, before + 1)
        moved = tokens.labels.to(here), tokens.row.to(here), tokens.rows
        answers.append(Hidden(*moved, states[positions.to(here)].float()))
    return answers


def _forward(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    # labels stay here: transformers would compute a loss of its own
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def _keys(batches: Sequence[Batch], layout: Layout, way: Way) -> TokenKeys | None:
    size, key = layout.inputs["input_ids"].numel(), batches[0].get("beginning")
    return keys_of(
        [batch.get("key") for batch in batches], layout.offsets, size, once=layout.common,
        beginning=None if key is None else (way.common, key),
    )  # fmt: skip


def _scored(batch: Batch) -> tuple[ScoredTokens, Tensor]:
    """The scored tokens, and the position that predicts each."""
    labels = batch["labels"][:, 1:]
    row, position = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
    return ScoredTokens(labels[row, position], row, len(labels)), position


@contextmanager
def _before_the_head(
    model: nn.Module, places: Sequence[Tensor], projected: Sequence[bool]
) -> Iterator[list[Tensor]]:
    """Let the output embedding see these places only, of those groups that are to be projected.

    The list gets the hidden states of every group.
    """
    selected: list[Tensor] = []

    def select(_module: nn.Module, args: Any) -> Any:
        hidden, *rest = args
        flat = hidden.flatten(0, 1)
        selected[:] = [
            flat[positions.to(flat.device)] for positions in places
        ]  # of several devices
        shown = [states for states, whole in zip(selected, projected, strict=True) if whole]
        seen = [positions for positions, whole in zip(places, projected, strict=True) if whole]
        narrow(torch.cat(seen) if seen else places[0][:0])
        return (torch.cat([flat[:0], *shown]).unsqueeze(0), *rest)

    handle = output_embedding(model).register_forward_pre_hook(select)
    try:
        yield selected
    finally:
        handle.remove()


@contextmanager
def _ending_after(model: nn.Module, layer: int) -> Iterator[list[Tensor]]:
    """Take the layers above away for a while; the list gets what the last one answers.

    The forward pass runs to its end, over fewer layers: an exception that cut it short would
    leave wrappers such as DDP half done.
    """
    parent, name, layers = _decoder(model)
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = layers[layer].register_forward_hook(keep)
    setattr(parent, name, layers[: layer + 1])
    try:
        yield seen
    finally:
        setattr(parent, name, layers)
        handle.remove()
