"""Keep a new adapter orthogonal to those of earlier requests. O3, arXiv:2407.10223.

O3 trains an adapter for each request and takes over the loss of O-LoRA (Wang et al. 2023,
arXiv:2310.14152): with A_i of the earlier adapters and A of the new one, in each layer

    L_orth = sum_i || A_i A^T || ** 2

so that what the new adapter reads of a layer's input is not what an earlier one reads. A run that
unlearns has few steps, in which a loss hardly turns A; so A also starts in the directions that are
left, which the papers leave to the loss. O3's detector, which decides at inference which adapters
are on, is not part of this.
"""

import logging
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from unlora.errors import InputError
from unlora.model.adapter import ADAPTER_WEIGHTS, stored_names
from unlora.model.adapter_init import lora_layers
from unlora.model.reference import POLICY
from unlora.model.run_defaults import RUN
from unlora.runs.safe_loading import read_mapping
from unlora.trainer.composed_step import Penalty

logger = logging.getLogger(__name__)


def keep_orthogonal(model: PeftModel, weight: float) -> Penalty | None:
    """Start the policy's A where no earlier unlearning adapter of the lineage reads.

    The adapter of a fine-tuning does not count: what is to be forgotten stands in it.

    Returns:
        ``weight`` * L_orth; None where nothing was unlearned before.

    Raises:
        InputError: the earlier adapters leave fewer directions than the new one has ranks.
    """
    links = [link.path for link in model.lineage.links if _unlearns(link.path)]
    earlier = _rows_of_a(links)
    layers = {
        name: layer
        for name, layer in lora_layers(model).items()
        if name in earlier and POLICY in layer.lora_A and not hasattr(layer, "parameter_name")
    }
    if not layers:
        logger.info("orthogonal: no adapter has unlearned anything before")
        return None
    for name, layer in layers.items():
        if not layer.lora_B[POLICY].weight.any():  # A may be another while B A is nothing
            _start_outside(name, layer.lora_A[POLICY].weight, earlier[name])
    logger.info("orthogonal: kept out of what %d earlier adapters read", len(links))

    def penalty(_model: nn.Module) -> Tensor:
        terms = []
        for name, layer in layers.items():
            a = layer.lora_A[POLICY].weight
            earlier[name] = earlier[name].to(a)
            terms.append((earlier[name] @ a.T).square().sum())
        return weight * torch.stack([term.to(terms[0].device) for term in terms]).sum()

    return penalty


def added(*penalties: Penalty | None) -> Penalty | None:
    """The sum of some losses on the weights, as far as there are some."""
    some = [penalty for penalty in penalties if penalty is not None]
    return (lambda model: torch.stack([each(model) for each in some]).sum()) if some else None


@torch.no_grad()
def _start_outside(name: str, a: nn.Parameter, earlier: Tensor) -> None:
    """Take out of the rows of A what the earlier ones span; each is as long as before."""
    _, values, directions = torch.linalg.svd(earlier.float(), full_matrices=False)
    spanned = directions[values > 1e-5 * values[0]].to(a.device)
    (rank, width), free = a.shape, a.shape[1] - len(spanned)
    if free < rank:
        raise InputError(
            f"The earlier adapters read {len(spanned)} of the {width} directions of {name}, so "
            f"{free} are left, and model.lora_config.r is {rank}. Set a smaller one, or leave the "
            "plug-in Orthogonal out."
        )
    outside = a.float() - a.float() @ spanned.T @ spanned
    a.copy_(outside * (a.float().norm(dim=1) / outside.norm(dim=1))[:, None])


def _rows_of_a(links: list[Path]) -> dict[str, Tensor]:
    """Name of a layer -> the rows of A of all its earlier adapters."""
    rows: dict[str, list[Tensor]] = {}
    for link in links:
        content = load_file(link / ADAPTER_WEIGHTS)
        for name, stored in stored_names(link).items():
            if name.endswith(".lora_A.weight"):
                layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                rows.setdefault(layer, []).append(content[stored])
    return {layer: torch.cat(parts) for layer, parts in rows.items()}


def _unlearns(link: Path) -> bool:
    file = link / RUN
    return file.is_file() and read_mapping(file).get("mode") == "unlearn"
