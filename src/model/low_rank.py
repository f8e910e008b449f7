"""Approximate a LoRA adapter by one of lower rank, by the SVD of its product in each module."""

import copy
import re
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from unlora.errors import InputError
from unlora.model.merge import without_adapters
from unlora.model.probe import Probe, tolerance
from unlora.model.targets import patterns_are_checked

LOST = 0.01  # of what the adapters do to log-probabilities, beside what rounding explains of logits
SIDE = re.compile(r"\.lora_(?:embedding_)?([AB])(?:\.weight)?$")


@dataclass(frozen=True)
class LowRank:
    """An adapter of lower rank.

    Attributes:
        tensors: name in its file -> value.
        share: of the squared norm of the changes of the weights, how much it holds; what is left
            out with a module is lost, too.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    share: float


def low_rank(
    config: LoraConfig, tensors: dict[str, Tensor], rank: int, *, without: str | None = None
) -> LowRank:
    """The best adapter of a rank: of B A, the largest singular values.

    Args:
        config: of an adapter without scaling, as joined ones are.
        without: name of a module that gets none.

    Raises:
        InputError: it is on parameters of experts, or on nothing else than what gets none.
    """
    if config.target_parameters:
        raise InputError(
            "An adapter on parameters (of experts) has no lower rank here. Export it with "
            "--adapter or --merged."
        )
    sides: dict[str, dict[str, str]] = {}
    for name in tensors:
        sides.setdefault(SIDE.sub("", name), {})[SIDE.search(name)[1]] = name  # type: ignore[index]
    whole = held = 0.0
    new: dict[str, Tensor] = {}
    for module, names in sides.items():
        a, b, values = _truncated(tensors[names["A"]], tensors[names["B"]], rank)
        whole += values.square().sum().item()
        if module.removeprefix("base_model.model.") == without:
            continue
        held += values[:rank].square().sum().item()
        new |= {names["A"]: a, names["B"]: b}
    if not new:
        raise InputError("The adapter is on the output head alone. Export it with --merged.")
    modules = sorted(set(config.target_modules or ()) - {without})
    settings = {"r": rank, "lora_alpha": rank, "target_modules": modules}
    joined = LoraConfig(
        **settings, bias="none", task_type="CAUSAL_LM", fan_in_fan_out=config.fan_in_fan_out
    )
    return LowRank(joined, new, held / whole if whole else 1.0)


def smallest_rank(
    base: PreTrainedModel, probe: Probe, config: LoraConfig, tensors: dict[str, Tensor]
) -> tuple[PreTrainedModel, LowRank]:
    """The adapter of the lowest rank with which a model answers as the whole adapter does.

    Args:
        base: the model that the adapter is on.
        probe: what the model with the whole adapter says.
        config: of an adapter without scaling, as joined ones are.

    Returns:
        The base as it was, and the adapter; the whole one where it is on parameters of experts.
    """
    if config.target_parameters:
        return base, LowRank(config, tensors, 1.0)
    whole = low_rank(config, tensors, config.r)
    with patterns_are_checked():
        network = PeftModel(base, copy.deepcopy(whole.config))
    too_low, enough = 0, config.r
    while enough - too_low > 1:
        rank = (too_low + enough) // 2
        set_peft_model_state_dict(network, _zero_after(rank, whole.tensors))
        seen = probe.compared(network)
        if seen.same(tolerance(network)) and seen.error <= LOST:
            enough = rank
        else:
            too_low = rank
    return without_adapters(network), low_rank(config, tensors, enough)


def _zero_after(rank: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an adapter with nothing beyond the first rows of A and columns of B."""
    zeroed = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, tensor in zeroed.items():
        (tensor if SIDE.search(name)[1] == "A" else tensor.T)[rank:] = 0  # type: ignore[index]
    return zeroed


def _truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """A and B of a rank, whose product is the nearest to B A; and all singular values of B A."""
    q_a, r_a = torch.linalg.qr(a.float().T)
    q_b, r_b = torch.linalg.qr(b.float())
    u, values, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = values[:rank].sqrt()
    missing = rank - len(root)  # a narrow module has no more
    new_a, new_b = (root[:, None] * v[:rank]) @ q_a.T, (q_b @ u[:, :rank]) * root
    pad = torch.nn.functional.pad
    return (
        pad(new_a, (0, 0, 0, missing)).contiguous(), pad(new_b, (0, missing)).contiguous(), values
    )  # fmt: skip
