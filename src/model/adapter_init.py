"""Initialise adapters from the weights they stand on (PiSSA, OLoRA), not from zero.

PiSSA, OLoRA, FILA and ReGLU give a new adapter a part of the weights and take the same part away
from the weights below. Here nothing below is changed: a frozen twin of the start, with the opposite
sign, takes it away instead:

    W + s B A - s B_0 A_0

So training starts exactly at the target, the model with its adapters off stays the reference, it
works the same for every kind of weights, and what is saved, [A; A_0] and [B, -B_0] as one adapter
of twice the rank, belongs on the unchanged model below.
"""

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unlora.errors import InputError
from unlora.model.adapter import ADAPTER_WEIGHTS
from unlora.model.reference import POLICY, START

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Factors:
    """A part of a weight, as the product b a.

    Attributes:
        b: what lora_B starts as.
        a: what lora_A starts as.
    """

    b: Float[Tensor, "out rank"]
    a: Float[Tensor, "rank in_"]


# name of the layer, its weight, rank, scaling -> factors
Start = Callable[[str, Float[Tensor, "out in_"], int, float], Factors]


def pissa(_name: str, weight: Float[Tensor, "out in_"], rank: int, scaling: float) -> Factors:
    """The principal singular values and vectors. Meng et al. 2024, arXiv:2404.02948, eq. 2-3."""
    return low_rank(weight, rank, scaling)


def olora(_name: str, weight: Float[Tensor, "out in_"], rank: int, _scaling: float) -> Factors:
    """The first columns of Q and rows of R. Büyükakyüz 2024, arXiv:2406.01775."""
    q, r = torch.linalg.qr(weight)
    return Factors(q[:, :rank], r[:rank])


def low_rank(weight: Float[Tensor, "out in_"], rank: int, scaling: float) -> Factors:
    """The factors of which ``scaling`` times the product is nearest to the weight."""
    u, values, v = torch.linalg.svd(weight, full_matrices=False)
    root = (values[:rank] / scaling).sqrt()
    return Factors(u[:, :rank] * root, root[:, None] * v[:rank])


STARTS: Mapping[str, Start] = {"pissa": pissa, "olora": olora}


def start_at(model: PeftModel, start: Start) -> None:
    """Start the policy's adapter at a part of the weights, beside the twin that takes it away.

    Raises:
        InputError: the weights are quantised, or the adapter is not plain LoRA of one rank, not
            alone, or started already.
    """
    config = model.peft_config[POLICY]
    if getattr(model, "is_quantized", False) or getattr(model.base_model, "is_quantized", False):
        raise InputError(
            "An adapter cannot start from quantised weights. Leave out "
            "model.model_args.quantization_config, or choose another start."
        )
    if config.use_dora or config.rank_pattern or config.alpha_pattern:
        raise InputError(
            "An adapter that starts from the weights must be plain LoRA of one rank: leave out "
            "use_dora, rank_pattern and alpha_pattern of model.lora_config."
        )
    if has_start(model):
        raise InputError(
            "The adapter starts from the weights already. Choose one start: "
            "model.lora_config.init_lora_weights, or a plug-in."
        )
    if len(model.peft_config) > 1:
        raise InputError(
            "An adapter can start from the weights only where no other adapter is on them. Set "
            "model.lineage=merge."
        )
    twin: LoraConfig = copy.deepcopy(config)
    twin.lora_dropout, twin.init_lora_weights = 0.0, True
    model.add_adapter(START, twin)
    if config.lora_dropout:
        # what the twin takes away must be what the policy adds, in training, too
        logger.info("an adapter that starts from the weights has no dropout")
        config.lora_dropout = 0.0
        for layer in lora_layers(model).values():
            layer.lora_dropout[POLICY] = nn.Identity()
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            base = layer.get_base_layer().weight
            weight = base.detach().float()
            weight = weight.T if layer.fan_in_fan_out else weight
            if config.r > min(weight.shape):
                raise InputError(
                    f"model.lora_config.r is {config.r}, but {name} has no more than "
                    f"{min(weight.shape)} directions to start from. Set a smaller r."
                )
            factors = start(name, weight, config.r, layer.scaling[POLICY])
            for adapter, sign in ((POLICY, 1), (START, -1)):
                layer.lora_A[adapter].weight.copy_(factors.a)
                layer.lora_B[adapter].weight.copy_(sign * factors.b)
    model.base_model.set_adapter([POLICY, START])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and f".{POLICY}." in name)


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Name in the plain model -> the layer that the policy's adapter is on."""
    return {
        name: module
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, LoraLayer) and POLICY in module.r
    }


def has_start(model: PeftModel) -> bool:
    """Whether the policy's adapter has a twin that it started from."""
    return START in model.peft_config


def save_with_start(model: PeftModel, folder: Path) -> None:
    """Write policy and twin as one adapter of twice the rank, for the model below them."""
    config: LoraConfig = copy.deepcopy(model.peft_config[POLICY])
    scaling = next(iter(lora_layers(model).values())).scaling[POLICY]
    config.r, config.use_rslora, config.init_lora_weights = 2 * config.r, False, True
    config.lora_alpha, config.inference_mode = scaling * config.r, True
    tensors = {}
    for name, layer in lora_layers(model).items():
        for matrix, axis in (("lora_A", 0), ("lora_B", 1)):
            both = [getattr(layer, matrix)[adapter].weight for adapter in (POLICY, START)]
            joined = torch.cat(both, axis).detach().cpu().contiguous()
            tensors[f"base_model.model.{name}.{matrix}.weight"] = joined
    config.save_pretrained(str(folder))
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def load_with_start(model: PeftModel, folder: Path) -> None:
    """Put back what :func:`save_with_start` wrote, bit by bit."""
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    rank = model.peft_config[POLICY].r
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            for matrix, axis in (("lora_A", 0), ("lora_B", 1)):
                joined = tensors[f"base_model.model.{name}.{matrix}.weight"]
                halves = joined.split(rank, dim=axis)
                for adapter, half in zip((POLICY, START), halves, strict=True):
                    getattr(layer, matrix)[adapter].weight.copy_(half)
