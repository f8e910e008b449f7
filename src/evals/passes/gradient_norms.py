"""Measure how strongly an answer would change the weights."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from unlora.data.chat_encoding import Encoded
from unlora.data.collate import collate
from unlora.errors import InputError
from unlora.evals.passes.batching import (
    Budget,
    Progress,
    answer_all,
    found_budget,
    needs_all_processes,
)
from unlora.evals.passes.declaration import Pass, PassInput, joined, register, split
from unlora.evals.passes.loglikelihood import takes_blocks, warn_of_dead
from unlora.evals.records import GradientNorms
from unlora.forward import IGNORE_INDEX
from unlora.forward.architecture import decoder_layers, output_embedding
from unlora.forward.lm_head import factors
from unlora.forward.modes import device_of, evaluating, in_full, unwrapped
from unlora.forward.vocab_stats import before_the_head, gradients_of

WITH_GRAPH = 0.25  # of the token budget: what every layer has seen is kept until the way back
LOGITS_WITH_GRAPH = 1 << 25  # where the head cannot be asked in blocks
ALL = "all-linear"


def gradient_norm(
    model: nn.Module,
    rows: Sequence[Encoded],
    *,
    pad_id: int,
    modules: str | Sequence[str] = ALL,
    batch_size: int | None = None,
    tokens: int | None = None,
    progress: Progress = lambda done: None,
) -> GradientNorms:
    """L2 norm of the gradient of each row's mean loss, over the weights of the declared modules.

    The weights are those that the model answers by: with adapters, W + s B A. So a model with an
    adapter and the same model merged have the same norm, and it compares with that of any other
    model of the same architecture. The gradient of a weight is never made: of a linear module with
    inputs a_t and gradients g_t of its outputs, ||sum_t g_t a_t'||^2 = sum_st (a_s.a_t)(g_s.g_t).

    NaN where no token is scored, or where the loss is not finite.

    Args:
        modules: ``all-linear`` for every linear module of the decoder layers, or the ends of their
            names, e.g. ``[down_proj]``.

    Raises:
        InputError: a name fits no module, or each process holds a part of the weights only.
    """
    lm = unwrapped(model)
    if needs_all_processes(lm):
        raise InputError(
            "Gradient norms are not computed while the weights are split over processes."
        )
    watched = declared(lm, modules)
    scored = [i for i, row in enumerate(rows) if any(x != IGNORE_INDEX for x in row.labels[1:])]

    def most(tokens: int | None) -> int:
        """The tokens of a batch that may all meet the vocabulary at once."""
        vocabulary = lm.config.get_text_config().vocab_size
        logits = int(LOGITS_WITH_GRAPH / WITH_GRAPH / vocabulary)
        return max(1, min(logits, tokens or found_budget(lm)))

    def norms(batch: list[int]) -> list[float]:
        inputs = collate([rows[i] for i in batch], pad_id)
        inputs = {name: tensor.to(device_of(lm)) for name, tensor in inputs.items()}
        with _watching(watched, inputs["input_ids"]) as squares, torch.enable_grad():
            _go_back(lm, inputs, blocks=blocks)
        return torch.stack([s.to("cpu") for s in squares]).sum(0).sqrt().tolist()

    with evaluating(lm), _frozen(lm):
        with torch.no_grad():
            blocks = takes_blocks(lm, pad_id)
        of_kept = answer_all(
            scored,
            [len(rows[i].input_ids) for i in scored],
            norms,
            lm,
            budget=Budget(tokens if blocks else most(tokens), batch_size),
            share=WITH_GRAPH,
            progress=lambda done: progress(sum(len(rows[i].input_ids) for i in done)),
        )
    by_row = dict(zip(scored, of_kept, strict=True))
    warn_of_dead(sum(norm != norm for norm in of_kept), len(rows))
    return GradientNorms([by_row.get(i, float("nan")) for i in range(len(rows))])


def declared(model: nn.Module, modules: str | Sequence[str]) -> list[nn.Module]:
    """The linear modules of the decoder layers with these names; those of adapters never.

    Raises:
        InputError: a name fits none of them.
    """
    layers = decoder_layers(model)
    names = [
        re.sub(r"\.base_layer$", "", name)
        for name, module in layers.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and "lora_" not in name
    ]
    # with an adapter around it a module is watched from outside: some adapters scale its weight
    linear = {name: layers.get_submodule(name) for name in names}
    wanted = [modules] if isinstance(modules, str) else list(modules)
    if wanted == [ALL]:
        return list(linear.values())
    matching: dict[str, nn.Module] = {}
    for end in wanted:
        called = {name: m for name, m in linear.items() if f".{name}".endswith(f".{end}")}
        if not called:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise InputError(
                f"gradient_modules names {end!r}, but no linear module of the decoder layers is "
                f"called so. Known: {known}; or {ALL}."
            )
        matching |= called
    return list(matching.values())


def _go_back(lm: Any, inputs: dict[str, Tensor], *, blocks: bool) -> None:
    """From the mean loss of every row back to the embedded tokens."""
    labels = inputs["labels"][:, 1:]
    row, position = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
    head, wanted = output_embedding(lm), labels[row, position]
    with before_the_head(head, row, position, whole=not blocks) as hidden:
        logits = lm(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        ).logits[0]  # fmt: skip
    row, wanted = row.to(logits.device), wanted.to(logits.device)
    share = 1 / in_full(row.bincount().to(logits.dtype))[row]
    products = factors(head, hidden[0]) if blocks else None
    if products is None:
        (share * F.cross_entropy(in_full(logits), wanted, reduction="none")).sum().backward()
        return
    with torch.no_grad():
        known = [(states.detach(), words) for states, words in products]
        gradients = gradients_of(known, wanted, share)
    torch.autograd.backward([states for states, _ in products], gradients)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No weight gets a gradient; the embedded tokens ask for one, so that the way back exists."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)

    def ask_for_one(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()

    handle = model.get_input_embeddings().register_forward_hook(ask_for_one)
    try:
        yield
    finally:
        handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _watching(
    modules: Sequence[nn.Module], ids: Int[Tensor, "rows time"]
) -> Iterator[list[Tensor]]:
    """Collects, of every module, the squared norm of its weight's gradient by row.

    Raises:
        InputError: a module is not shown the tokens row by row.
    """
    squares: list[Tensor] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        seen = args[0].detach()
        if not isinstance(output, Tensor) or seen.shape[:-1].numel() != ids.numel():
            raise InputError(
                f"A {type(module).__name__} of this architecture is not shown every token, so no "
                "gradient norm by row is known of it. Name others with gradient_modules, e.g. "
                "[q_proj, v_proj]."
            )

        def note(gradient: Tensor) -> None:
            # some layers are shown all rows as one
            a, g = (t.reshape(*ids.shape, t.shape[-1]) for t in (seen, gradient))
            squares.append(_square(a, g))

        output.register_hook(note)

    handles = [module.register_forward_hook(watch) for module in modules]
    try:
        yield squares
    finally:
        for handle in handles:
            handle.remove()


def _square(
    seen: Float[Tensor, "rows time wide"], gradient: Float[Tensor, "rows time out"]
) -> Float[Tensor, " rows"]:
    """Squared norm of sum_t gradient_t seen_t', by the cheaper of two ways."""
    a, g = (t if t.dtype == torch.float64 else t.float() for t in (seen, gradient))
    time, wide, out = a.shape[1], a.shape[2], g.shape[2]
    if time * (wide + out) < wide * out:
        return ((a @ a.mT) * (g @ g.mT)).sum((1, 2)).double()
    return (g.mT @ a).square().sum((1, 2)).double()


def _run(model: nn.Module, inputs: Sequence[PassInput], **limits: Any) -> list[list[float]]:
    rows = [data.answers for data in inputs]
    norms = gradient_norm(
        model, joined(rows),
        pad_id=inputs[0].source.chat.tokenizer.pad_token_id,
        modules=inputs[0].settings.gradient_modules, **limits,
    )  # fmt: skip
    return split(norms, rows)


register(
    Pass(
        "gradient_norm", version=1, order=5, record=GradientNorms, run=_run,
        pack=lambda norms, data: {"value": np.array(norms)} | data.facts,
        unpack=lambda arrays, data: GradientNorms(arrays["value"].tolist()),
        setting=lambda data: data.settings.gradient_modules,
        why_not=lambda suite, settings, model: None if model is None else model.no_gradients,
    )
)  # fmt: skip
