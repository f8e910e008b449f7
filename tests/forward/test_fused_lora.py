"""Layers that are computed together: peft's numbers and gradients, and peft's forward elsewhere."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from unlora.forward import fused_lora
from unlora.forward.fused_lora import fuse_lora, layers_by_input
from unlora.forward.keyed_dropout import KeyedDropout, keys_of, row_keys, token_keys

P, TOKENS, WIDTH = 0.2, 12, 8
# of the largest number, as what is rounded is a sum
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}


class Block(nn.Module):
    """A model with the projections' usual names; k and v are narrower."""

    def __init__(self, bias=False):
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, 4, bias=bias) for _ in range(2))
        self.o_proj = nn.Linear(4, WIDTH, bias=bias)

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return x + self.o_proj(torch.tanh(q.sum(-1, keepdim=True) * k) * v)


def peft_model(dtype=torch.float32, p=P, bias=False, **settings):
    """Its matrices B are not zero, and masks go by the tokens' keys."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=3, lora_alpha=5, lora_dropout=p, **{"target_modules": "all-linear"} | settings
    )
    model = get_peft_model(Block(bias).to(dtype), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    groups = layers_by_input(model)
    for number, layers in enumerate(groups):
        for layer in layers:
            if p:
                layer.lora_dropout["default"] = KeyedDropout(p, number, len(groups), 0)
    return model.train()


def fused_and_peft(**settings):
    model = peft_model(**settings)
    plain = copy.deepcopy(model)
    fuse_lora(model, "default")
    return model, plain


def keys():
    return keys_of([row_keys(torch.arange(2), 0)], [torch.tensor([0, 6])], TOKENS)


def answer(model, x, run=lambda model, x: model(x)):
    """Outputs, and the gradients of the input and of every weight that has one."""
    x = x.clone().requires_grad_()
    with token_keys(keys()):
        y = run(model, x)
        (y.double() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"output": y.detach(), "input": x.grad, **trained}


def assert_equal(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        difference = (found[name] - tensor).abs().max()
        assert difference <= tolerance * tensor.abs().max(), name


def inputs(dtype=torch.float32):
    return torch.randn(2, TOKENS // 2, WIDTH, generator=torch.manual_seed(1)).to(dtype)


def calls(monkeypatch):
    """The number of layers of every fused computation."""
    counts = []
    apply = fused_lora._FusedLoRA.apply

    def counted(mask, scales, *rest):
        counts.append(len(scales))
        return apply(mask, scales, *rest)

    monkeypatch.setattr(fused_lora._FusedLoRA, "apply", counted)
    return counts


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("p", [0.0, P])
def test_outputs_and_gradients_are_those_of_peft(dtype, p, monkeypatch):
    fused, plain = fused_and_peft(dtype=dtype, p=p, bias=True)
    expected = answer(plain, inputs(dtype))
    counts = calls(monkeypatch)
    assert_equal(answer(fused, inputs(dtype)), expected, TOLERANCE[dtype])
    assert counts == [3, 1]  # q, k and v; o


def test_outputs_are_the_formula_with_a_mask_for_each_input():
    fused, _ = fused_and_peft(dtype=torch.float64)
    x, layers = inputs(torch.float64), fused.base_model.model
    with token_keys(keys()):
        masks = [
            layer.lora_dropout["default"](torch.ones(2, TOKENS // 2, width, dtype=torch.float64))
            for layer, width in ((layers.q_proj, WIDTH), (layers.o_proj, 4))
        ]

    def linear(layer, x, mask):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return x @ layer.weight.T + 5 / 3 * (x * mask) @ a.T @ b.T

    q, k, v = (linear(layers.get_submodule(f"{n}_proj"), x, masks[0]) for n in "qkv")
    expected = x + linear(layers.o_proj, torch.tanh(q.sum(-1, keepdim=True) * k) * v, masks[1])
    with token_keys(keys()):
        torch.testing.assert_close(fused(x), expected)
    assert not torch.allclose(masks[0], torch.ones(()).double())


def test_gradients_are_those_of_differences():
    torch.manual_seed(0)
    x, *tensors = (torch.randn(*shape).double().requires_grad_() for shape in
                   ((4, 5), (2, 5), (6, 2), (1, 5), (3, 1)))  # fmt: skip
    w = torch.randn(6, 5).double(), torch.randn(3, 5).double()
    a1, b1, a2, b2 = tensors

    def function(x, a1, b1, a2, b2):
        return fused_lora._FusedLoRA.apply(
            None, [0.5, 2.0], x, w[0], None, a1, b1, w[1], None, a2, b2
        )

    assert torch.autograd.gradcheck(function, (x, a1, b1, a2, b2))


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_are_computed_again_have_the_same_gradients(reentrant):
    fused, plain = fused_and_peft()
    found = answer(fused, inputs(), lambda model, x: checkpoint(model, x, use_reentrant=reentrant))
    assert_equal(found, answer(plain, inputs()), 1e-6)


def test_an_input_without_gradient_and_an_output_without_use_are_left_out():
    fused, plain = fused_and_peft()
    for model in (fused, plain):
        layers = model.base_model.model
        with token_keys(keys()):
            (layers.q_proj(inputs()).sum() + layers.v_proj(inputs()).sum()).backward()
    for name, parameter in plain.named_parameters():
        found = fused.get_parameter(name).grad
        if parameter.grad is None:
            assert found is None or not found.any()
        else:
            torch.testing.assert_close(found, parameter.grad)


def test_a_layer_that_reads_another_input_is_computed_by_itself():
    fused, plain = fused_and_peft()
    outputs = []
    for model in (fused, plain):
        x, layers = inputs(), model.base_model.model
        with token_keys(keys()):
            q = layers.q_proj(x)
            k = layers.k_proj(2 * x)
            x += 1  # the same tensor, with another content
            outputs.append([q, k, layers.v_proj(x)])
    for found, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(found, expected)


def test_only_layers_with_the_same_dropout_are_computed_together(monkeypatch):
    fused, plain = fused_and_peft()
    for model in (fused, plain):
        model.base_model.model.k_proj.lora_dropout["default"] = nn.Identity()
    counts = calls(monkeypatch)
    assert_equal(answer(fused, inputs()), answer(plain, inputs()), 1e-6)
    assert counts == [2, 1, 1]


def stacked(model):
    model.add_adapter("below", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "below"])


def hooked(model):
    model.base_model.model.q_proj.lora_A["default"].register_forward_hook(lambda *_: None)


def dropping(model):
    for layer in (layer for layers in layers_by_input(model) for layer in layers):
        layer.lora_dropout["default"] = nn.Dropout(0.5)


@pytest.mark.parametrize(
    "change",
    [
        nn.Module.eval,
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: model.merge_adapter(),
        stacked,
        dropping,
        lambda model: model.base_model.model.requires_grad_(True),
    ],
    ids=["evaluation", "off", "merged", "several", "torch's dropout", "weights trained as well"],
)
def test_everything_else_is_left_to_peft(change, monkeypatch):
    fused, plain = fused_and_peft()
    for model in (fused, plain):
        change(model)
    counts = calls(monkeypatch)
    found = []
    for model in (fused, plain):
        torch.manual_seed(0)
        with token_keys(keys()):
            found.append(model(inputs()))
    assert not counts
    assert torch.equal(*found)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True, "bias": "all"}])
def test_other_kinds_of_lora_are_left_to_peft(settings, monkeypatch):
    fused, plain = fused_and_peft(**settings)
    counts = calls(monkeypatch)
    assert_equal(answer(fused, inputs()), answer(plain, inputs()), 0)
    assert not counts


def test_only_the_layer_with_a_hook_is_left_to_peft(monkeypatch):
    fused, plain = fused_and_peft()
    hooked(fused)
    counts = calls(monkeypatch)
    assert_equal(answer(fused, inputs()), answer(plain, inputs()), 1e-6)
    assert counts == [2, 1]


def test_without_gradients_and_under_autocast_peft_computes(monkeypatch):
    fused, plain = fused_and_peft()
    counts = calls(monkeypatch)
    for without in (torch.no_grad, torch.inference_mode):
        with token_keys(keys()), without():
            assert torch.equal(fused(inputs()), plain(inputs()))
    with token_keys(keys()), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(inputs()), plain(inputs()))
    assert not counts


def test_a_copy_trains_its_own_weights():
    fused, _ = fused_and_peft()
    copied = copy.deepcopy(fused)
    with torch.no_grad():
        copied.base_model.model.q_proj.lora_B["default"].weight.mul_(2)
    with token_keys(keys()):
        first, second = fused(inputs()), copied(inputs())
    assert not torch.allclose(first, second)
    second.sum().backward()
    assert all(parameter.grad is None for parameter in fused.parameters())
