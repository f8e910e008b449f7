"""Round the weights, as inference in 4 or 8 bits does. arXiv:2410.16454."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from unlora.audits.attack import MergedModel, attack
from unlora.forward.architecture import output_embedding
from unlora.registry import AtLeastOne

# NormalFloat, arXiv:2305.14314, appendix E
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
SMALLEST = 1e-38  # absmax of a block of zeros


@attack("quantise")
@torch.no_grad()
def quantise(
    model: MergedModel, *, form: Literal["nf4", "int4", "int8"] = "nf4", block: AtLeastOne = 64
) -> None:
    """Round the weight of every linear layer but the output embedding.

    These are the layers that transformers quantises with bitsandbytes; experts that are one tensor
    of three dimensions stay as they are, there as here.

    Args:
        form: ``nf4`` as bitsandbytes has it (no double quantisation); ``int4`` and ``int8`` as
            weight-only quantisation of torchao, symmetric and per output channel.
        block: weights that share a scale in nf4; the last block may have fewer.
    """
    network: nn.Module = model
    head = output_embedding(network)
    weights = {
        id(layer.weight): (layer.weight, type(layer) is Conv1D)  # which is transposed
        for layer in network.modules()
        if type(layer) in (nn.Linear, Conv1D) and layer.weight is not head.weight
    }
    for weight, is_transposed in weights.values():
        by_output = weight.T if is_transposed else weight
        bits = 4 if form == "int4" else 8
        by_output.copy_(
            nf4(by_output, block) if form == "nf4" else rounded_by_channel(by_output, bits)
        )


def nf4(weight: Float[Tensor, "out in"], block: int = 64) -> Float[Tensor, "out in"]:
    """Round every block of consecutive weights to the 16 values of NF4 times its largest.

    In float32, whatever the dtype; halfway between two values it is the lower one.
    """
    values = torch.tensor(NF4, device=weight.device)
    flat = weight.float().flatten()
    blocks = nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    absmax = blocks.abs().amax(1, keepdim=True)
    scaled = (blocks * (1 / absmax.clamp(min=SMALLEST))).clamp(-1, 1)
    codes = torch.bucketize(scaled, (values[:-1] + values[1:]) / 2, out_int32=True)
    return (values[codes] * absmax).flatten()[: len(flat)].view(weight.shape)


def rounded_by_channel(weight: Float[Tensor, "out in"], bits: int) -> Float[Tensor, "out in"]:
    """Round every row to integers times a scale, half to even; the largest weight is clipped.

    The arithmetic is that of the weight's dtype, the scale of ``int8`` is a float32.
    """
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    smallest = torch.finfo(torch.float32).eps if bits == 8 else torch.finfo(weight.dtype).tiny
    scale = (weight.abs().amax(1, keepdim=True) / ((highest - lowest) / 2)).clamp(min=smallest)
    if bits == 8:
        scale = scale.to(torch.promote_types(weight.dtype, torch.float32))
    return (weight * (1 / scale)).round().clamp(lowest, highest) * scale
