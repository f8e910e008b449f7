"""Initialise the adapter for FILA and ReGLU, which ask the model before the first step."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn

from unlora.data.chat_encoding import Encoded
from unlora.data.collate import collate
from unlora.data.pairs import Parts
from unlora.errors import InputError
from unlora.forward.forward_pass import ask, scored_tokens
from unlora.model.adapter_init import Factors, Start, lora_layers, low_rank, start_at
from unlora.model.reference import POLICY
from unlora.trainer.composed_step import Penalty
from unlora.trainer.plugins import FILA, ReGLU

EPSILON = 1e-5  # as in LoKU's code
GROUPS = 8  # see few_at_a_time
logger = logging.getLogger(__name__)


def start_adapter(
    model: PeftModel, plugin: FILA | ReGLU, parts: Parts, *, pad_id: int, batch_size: int, seed: int
) -> Penalty | None:
    """Start the policy's adapter as the plug-in says.

    Returns:
        The loss on the weights that goes with it, if there is one.
    """
    draw = np.random.default_rng(seed)
    batches = {}
    for part in ("forget", "retain"):
        rows = parts.rows[part]
        chosen = draw.permutation(len(rows))[: plugin.num_rows]
        batches[part] = as_batches([rows[i] for i in chosen], pad_id, batch_size, model)
    logger.info("start: asking the model about %d rows of each part", plugin.num_rows)
    if isinstance(plugin, FILA):
        start_at(model, _fila(model, batches["forget"], batches["retain"]))
        return None
    outputs = {part: _outputs_by_row(model, batches_of) for part, batches_of in batches.items()}
    start_at(model, _reglu(outputs["forget"], outputs["retain"], plugin.beta))
    if not (plugin.orthogonal_weight and plugin.orthogonal_rank):
        return None
    return _kept_out_of(outputs["retain"], plugin.orthogonal_rank, plugin.orthogonal_weight)


# --- FILA ----------------------------------------------------------------------------------------


def _fila(model: PeftModel, forget: Sequence[dict], retain: Sequence[dict]) -> Start:
    """The part of each weight that is nearest to it where forget data matter more than retain data.

    The importance of row i is w_i = sqrt(sum_j F_forget[i, j] / (F_retain[i, j] + eps)), and the
    part is diag(1 / w) of the best low-rank diag(w) W, as in LoKU's code.
    """
    layers = lora_layers(model)
    weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    importances = {}
    for group in few_at_a_time(weights):
        about_forget, about_retain = fisher(model, forget, group), fisher(model, retain, group)
        for name in group:
            ratio = about_forget[name] / (about_retain[name] + EPSILON)
            ratio = ratio.T if layers[name].fan_in_fan_out else ratio
            importances[name] = ratio.sum(1).sqrt()[:, None]

    def start(name: str, weight: Float[Tensor, "out in_"], rank: int, scaling: float) -> Factors:
        importance = importances[name].to(weight)
        factors = low_rank(importance * weight, rank, scaling)
        return Factors(factors.b / (importance + EPSILON), factors.a)

    return start


def few_at_a_time(weights: Mapping[str, nn.Parameter]) -> Iterator[dict[str, nn.Parameter]]:
    """The weights in groups, each of about an eighth of them all.

    The Fisher information of a weight is as large as the weight. Asking the model once for every
    group takes longer than once for all, and keeps the memory near that of training.
    """
    most = sum(weight.numel() for weight in weights.values()) / GROUPS
    group: dict[str, nn.Parameter] = {}
    for name, weight in weights.items():
        if group and sum(w.numel() for w in group.values()) + weight.numel() > most:
            yield group
            group = {}
        group[name] = weight
    yield group


def fisher(
    model: nn.Module, batches: Sequence[dict], weights: Mapping[str, nn.Parameter]
) -> dict[str, Float[Tensor, "..."]]:
    """Mean square of the likelihood's gradient by every weight, one gradient per batch.

    A batch counts by its scored tokens, and has the gradient of their mean, as in LoKU's code.

    Returns:
        float32 on the CPU, in the shape of each weight.

    Raises:
        InputError: the weights are quantised.
    """
    if not all(weight.is_floating_point() for weight in weights.values()):
        raise InputError(
            "The Fisher information of quantised weights cannot be found. Leave out "
            "model.model_args.quantization_config."
        )
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    information = {name: torch.zeros(w.shape, dtype=torch.float32) for name, w in weights.items()}
    tokens = [scored_tokens(batch) for batch in batches]
    shares = [len(x.labels) / sum(len(y.labels) for y in tokens) for x in tokens]
    counts = {"share": 0.0}

    def add(name: str) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            # the gradient is used up here: no two of them are ever held at once
            assert weight.grad is not None
            information[name] += counts["share"] * weight.grad.float().square().cpu()
            weight.grad = None

        return hook

    model.requires_grad_(False)
    handles = []
    for name, weight in weights.items():
        weight.requires_grad_(True)
        handles.append(weight.register_post_accumulate_grad_hook(add(name)))
    try:
        with _in_eval_mode(model):
            for share, batch in zip(shares, batches, strict=True):
                counts["share"] = share
                (-ask(model, batch).token_logps.mean()).backward()
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
    return information


# --- ReGLU ---------------------------------------------------------------------------------------


def _reglu(forget: dict[str, Tensor], retain: dict[str, Tensor], beta: float) -> Start:
    """lora_B spans the outputs that forget data have and retain data have not."""

    def start(name: str, weight: Float[Tensor, "out in_"], rank: int, _scaling: float) -> Factors:
        directions = contrast(forget[name], retain[name], beta, rank).to(weight)
        return Factors(directions, directions.T @ weight)

    return start


def contrast(
    forget: Float[Tensor, "rows out"], retain: Float[Tensor, "others out"], beta: float, rank: int
) -> Float[Tensor, "out rank"]:
    """Leading eigenvectors of (1 - beta) Cov(forget) - beta Cov(retain), found among the rows.

    That matrix has a row and a column for each output, of which a head has 100,000; its range is
    spanned by what the rows have, of which there are fewer. It has no more positive eigenvalues
    than there are forget rows. Where more directions are wanted, the next are those of eigenvalue
    0, which no row has any part of, and only then those that retain data have more of.
    """
    shares = ((1 - beta) / len(forget), beta / len(retain))
    stacked = torch.cat([forget * shares[0] ** 0.5, retain * shares[1] ** 0.5])
    sign = torch.cat([torch.ones(len(forget)), -torch.ones(len(retain))]).to(stacked)
    basis, coordinates = torch.linalg.qr(stacked.T)
    values, vectors = torch.linalg.eigh(coordinates * sign @ coordinates.T)
    leading = basis @ vectors.flip(1)
    positive = int((values > 1e-6 * values.abs().max()).sum())
    outputs, spanned = basis.shape
    free = min(rank - positive, outputs - spanned)
    if free <= 0:
        return leading[:, :rank]
    drawn = torch.randn(outputs, free, generator=torch.Generator().manual_seed(0)).to(basis)
    for _ in range(2):  # once more for what rounding has left
        drawn = torch.linalg.qr(drawn - basis @ (basis.T @ drawn)).Q
    return torch.cat([leading[:, :positive], drawn, leading[:, positive:]], 1)[:, :rank]


def _kept_out_of(retain: dict[str, Tensor], rank: int, weight: float) -> Penalty:
    """weight * sum over the layers of || B^T P || ** 2, P the leading retain directions."""
    directions = {
        name: torch.linalg.svd(outputs, full_matrices=False).Vh[:rank].T.contiguous()
        for name, outputs in retain.items()
    }

    def penalty(model: nn.Module) -> Tensor:
        assert isinstance(model, PeftModel)
        total = []
        for name, layer in lora_layers(model).items():
            b = layer.lora_B[POLICY].weight
            directions[name] = directions[name].to(b)
            total.append((b.T @ directions[name]).square().sum())
        return weight * torch.stack([x.to(total[0].device) for x in total]).sum()

    return penalty


@torch.no_grad()
def _outputs_by_row(
    model: PeftModel, batches: Sequence[dict]
) -> dict[str, Float[Tensor, "rows out"]]:
    """Sum each adapted layer's outputs over a row's tokens; of the head, over the scored ones."""
    layers = lora_layers(model)
    by_layer: dict[str, list[Tensor]] = {name: [] for name in layers}
    batch: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            mask = batch["attention_mask"].bool()
            if output.shape[:2] != mask.shape:  # the head, see unlora.forward.forward_pass
                row = scored_tokens(batch).row
            else:
                row, output = mask.nonzero(as_tuple=True)[0], output[mask.to(output.device)]
            sums = output.new_zeros(len(mask), output.shape[-1], dtype=torch.float32)
            per_token = output.flatten(0, -2).float()
            by_layer[name].append(sums.index_add(0, row.to(output.device), per_token).cpu())

        return hook

    handles = [layers[n].get_base_layer().register_forward_hook(keep(n)) for n in layers]
    try:
        with _in_eval_mode(model):
            for batch in batches:
                ask(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(tensors) for name, tensors in by_layer.items()}


# --- both ----------------------------------------------------------------------------------------


def as_batches(rows: Sequence[Encoded], pad_id: int, size: int, model: nn.Module) -> list[dict]:
    """Collate the rows in batches of ``size``, on the device of the model's embedding."""
    device = model.get_input_embeddings().weight.device
    return [
        {name: t.to(device) for name, t in collate(rows[i : i + size], pad_id).items()}
        for i in range(0, len(rows), size)
    ]


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
