"""Rounded weights against rounding one weight at a time, and against the libraries that do it."""

import copy
import math

import numpy as np
import pytest
import tiny
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from unlora.audits.attack import ATTACKS
from unlora.audits.attacks.quantise import NF4, nf4, quantise, rounded_by_channel
from unlora.errors import InputError


def nf4_literally(weight, block=64):
    flat, values = weight.float().flatten().numpy(), np.array(NF4, dtype=np.float32)
    result = []
    for start in range(0, len(flat), block):
        part = flat[start : start + block]
        absmax = np.abs(part).max()
        inverse = np.float32(1) / absmax if absmax else np.float32(0)
        for number in part:
            distances = [abs(np.float64(number * inverse) - np.float64(v)) for v in values]
            result.append(values[int(np.argmin(distances))] * absmax)  # the first of two
    return torch.tensor(np.array(result)).view(weight.shape)


def channels_literally(weight, bits):
    result = weight.clone()
    for i, row in enumerate(weight.tolist()):
        scale = max(map(abs, row)) / ((2**bits - 1) / 2)
        for j, number in enumerate(row):
            level = round(number * (1 / scale)) if scale else 0  # half to even
            result[i, j] = min(max(level, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1) * scale
    return result


def matrix(rows, columns, dtype=torch.float32, *, seed=0):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[rows // 2] = 0
    return weight.to(dtype)


@pytest.mark.parametrize("shape", [(8, 16), (7, 37), (1, 3), (5, 64)])  # 7 * 37: a part of a block
def test_nf4_is_the_nearest_of_sixteen_values_times_the_largest_of_a_block(shape):
    weight = matrix(*shape)
    assert torch.equal(nf4(weight), nf4_literally(weight))
    assert torch.equal(nf4(weight, 16), nf4_literally(weight, 16))


def test_halfway_between_two_values_of_nf4_it_is_the_lower():
    halves = [(NF4[i] + NF4[i + 1]) / 2 for i in range(15)]
    exact = [x for x in halves if float(np.float32(x)) == x]
    assert exact
    weight = torch.tensor([[*exact, 1.0]])
    expected = [NF4[halves.index(x)] for x in exact]
    assert nf4(weight)[0, :-1].tolist() == pytest.approx(expected, abs=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_share_a_scale_in_every_row(bits):
    weight = matrix(6, 37, torch.float64)
    found = rounded_by_channel(weight, bits)
    assert torch.allclose(found, channels_literally(weight, bits), rtol=0, atol=1e-15)
    assert len(found[0].unique()) <= 2**bits


def test_every_linear_layer_but_the_output_embedding_is_rounded():
    for tied in (False, True):
        model = tiny.llama(tied=tied)
        before = copy.deepcopy(model.state_dict())
        quantise(model, form="int4")
        for name, weight in model.state_dict().items():
            is_rounded = name.endswith("_proj.weight")
            expected = rounded_by_channel(before[name], 4) if is_rounded else before[name]
            assert torch.equal(weight, expected), name
            assert torch.equal(weight, before[name]) != is_rounded


def test_transposed_weights_are_rounded_by_their_outputs():
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "n_embd": 12, "n_layer": 1, "n_head": 2, "n_positions": 8}
    model = GPT2LMHeadModel(GPT2Config(**shape))
    before = copy.deepcopy(model.state_dict())
    quantise(model, form="nf4", block=32)
    name = "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(model.state_dict()[name], nf4(before[name].T, 32).T)
    assert torch.equal(model.lm_head.weight, before["lm_head.weight"])


def test_weights_keep_their_dtype_and_gradients_are_not_recorded():
    model = tiny.llama(dtype=torch.bfloat16)
    quantise(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.bfloat16 and weight.grad_fn is None
    weights = [w for w in nf4(matrix(4, 64)).flatten().tolist() if w]
    assert all(map(math.isfinite, weights))


def test_what_it_may_be_set_to_is_checked():
    attack = ATTACKS["quantise"]
    assert attack.kind == "merged" and attack.configured({"form": "int8"})["block"] == 64
    with pytest.raises(InputError, match="form of attack quantise 'int3'. Did you mean 'int"):
        attack.configured({"form": "int3"})
    with pytest.raises(InputError, match="block of attack quantise is 0; it must be 1 or more"):
        attack.configured({"block": 0})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(48, 64), (96, 128), (7, 37), (64, 65)])
def test_it_equals_bitsandbytes(shape, dtype):
    functional = pytest.importorskip("bitsandbytes").functional
    weight = matrix(*shape, dtype)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    expected = functional.dequantize_4bit(codes, state).view(shape)
    assert torch.equal(nf4(weight).to(dtype), expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_it_equals_torchao(bits, dtype):
    ao = pytest.importorskip("torchao.quantization")
    layer = torch.nn.Linear(37, 11, bias=False)
    layer.weight.data = weight = matrix(11, 37, dtype)
    config = ao.IntxWeightOnlyConfig(torch.int4) if bits == 4 else ao.Int8WeightOnlyConfig()
    ao.quantize_(layer, config)
    assert torch.equal(rounded_by_channel(weight, bits).to(dtype), layer.weight.dequantize())
