"""A lower rank keeps the largest singular values of the product, and says what it lost."""

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from tiny import adapted, llama

from unlora.errors import InputError
from unlora.model.low_rank import low_rank, smallest_rank
from unlora.model.probe import Probe

NAME = "base_model.model.{}.lora_{}.weight"


def adapter(**products):
    """Config and tensors of modules, each with the given singular values."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    rank = max(map(len, products.values()))
    for module, values in products.items():
        a, _ = torch.linalg.qr(torch.randn(12, rank, generator=generator))
        b, _ = torch.linalg.qr(torch.randn(9, rank, generator=generator))
        tensors[NAME.format(module, "A")] = a.T
        tensors[NAME.format(module, "B")] = b * torch.tensor(values)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(products))
    return config, tensors


def product(tensors, module):
    return tensors[NAME.format(module, "B")] @ tensors[NAME.format(module, "A")]


def test_the_largest_singular_values_stay():
    config, tensors = adapter(q=[3.0, 2.0, 1.0, 0.5])
    small = low_rank(config, tensors, 2)
    assert small.config.r == small.config.lora_alpha == 2
    assert small.share == pytest.approx(13 / 14.25)  # 9 + 4 of 9 + 4 + 1 + 0.25
    u, s, v = torch.linalg.svd(product(tensors, "q"), full_matrices=False)
    best = u[:, :2] * s[:2] @ v[:2]
    torch.testing.assert_close(product(small.tensors, "q"), best)


def test_a_rank_that_is_large_enough_loses_nothing():
    config, tensors = adapter(q=[3.0, 2.0], v=[1.0, 0.1])
    for rank in (2, 5, 20):  # no module has more than 9 dimensions
        small = low_rank(config, tensors, rank)
        assert small.share == pytest.approx(1) and small.config.r == rank
        for module in ("q", "v"):
            torch.testing.assert_close(product(small.tensors, module), product(tensors, module))
            assert small.tensors[NAME.format(module, "A")].shape == (rank, 12)


def test_what_is_left_out_with_a_module_is_lost():
    config, tensors = adapter(q=[3.0, 2.0], lm_head=[1.0, 0.0])
    small = low_rank(config, tensors, 2, without="lm_head")
    assert set(small.config.target_modules) == {"q"} and small.share == pytest.approx(13 / 14)
    assert not any("lm_head" in name for name in small.tensors)
    with pytest.raises(InputError, match="on the output head alone"):
        low_rank(*adapter(lm_head=[1.0]), 1, without="lm_head")


@pytest.mark.parametrize("sizes, rank", [
    ([1.0, 1.0, 1e-6, 1e-6], 2),
    ([1.0, 1.0, 0.1, 1e-6], 3),  # a little of what the adapter does is not nothing
    ([0.0, 0.0, 0.0, 0.0], 1),
    ([1.0, 1.0, 1.0, 1.0], 4),
])  # fmt: skip
def test_the_smallest_rank_is_the_one_that_the_answers_need(sizes, rank):
    model = adapted(lora_alpha=4)  # of rank 4, so its scale is 1
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data *= torch.tensor(sizes)
    config, tensors = (
        model.peft_config["default"],
        get_peft_model_state_dict(model, save_embedding_layers=False),
    )
    base, small = smallest_rank(llama(), Probe.of(model), config, tensors)
    assert small.config.r == small.config.lora_alpha == rank
    torch.testing.assert_close(dict(base.named_parameters()), dict(llama().named_parameters()))
