"""Approximate a LoRA adapter by one of lower rank, by the SVD of its product in each module."""

import re
from dataclasses import dataclass

import torch
from peft import LoraConfig
from torch import Tensor

from unlora.errors import InputError

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
