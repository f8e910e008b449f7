"""Adapters that start from the weights: what they start as, and what is kept of them."""

import json

import pytest
import torch
from model.test_lora import disturb
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import LORA, VOCABULARY, llama, rows, tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from unlora.data.collate import collate
from unlora.errors import InputError
from unlora.forward.forward_pass import ask
from unlora.model import get_model
from unlora.model.adapter_init import (
    STARTS,
    Factors,
    has_start,
    load_with_start,
    lora_layers,
    low_rank,
    start_at,
)
from unlora.model.guards import start_equals_target
from unlora.model.lora import LoRAModelForCausalLM, save_adapter
from unlora.model.probe import Probe
from unlora.model.reference import POLICY, START, as_reference
from unlora.model.standalone import export

# s = lora_alpha / r = 2, 1.5, and 6 / sqrt(4) = 3
SCALINGS = {
    "alpha 2r": {},
    "alpha": {"lora_alpha": 6},
    "rslora": {"lora_alpha": 6, "use_rslora": True},
}
SCALING = {"alpha 2r": 2.0, "alpha": 1.5, "rslora": 3.0}


@pytest.fixture
def root(tmp_path):
    llama().save_pretrained(tmp_path / "root")
    tokenizer().save_pretrained(tmp_path / "root")
    return str(tmp_path / "root")


def started(root, start, **config):
    return LoRAModelForCausalLM.from_pretrained(
        root, {**LORA, "init_lora_weights": start, **config}
    )


def factors(layer, adapter=POLICY):
    return layer.lora_B[adapter].weight.detach(), layer.lora_A[adapter].weight.detach()


def scored(model):
    """Logits of the scored tokens of rows of unequal length, in eval mode."""
    model.eval()
    with torch.no_grad():
        return ask(model, collate(rows([3, 7, 1]), pad_id=258)).logits


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("start", STARTS)
def test_it_starts_exactly_at_the_target(root, start, scaling):
    plain = llama()
    model = started(root, start, **SCALINGS[scaling])
    said, expected = scored(model), scored(plain)
    # float32: W x + s B A x - s B A x with terms of size ten; logits are a few units large
    assert expected.abs().max() > 3
    torch.testing.assert_close(said, expected, rtol=0, atol=1e-5)
    start_equals_target(model, model.target)
    for name, layer in lora_layers(model).items():
        assert layer.scaling[POLICY] == layer.scaling[START] == pytest.approx(SCALING[scaling])
        (b, a), (minus_b, twin_a) = factors(layer), factors(layer, START)
        assert torch.equal(b, -minus_b) and torch.equal(a, twin_a)
        assert (layer.scaling[POLICY] * b @ a).norm() > 0.1 * plain.get_submodule(
            name
        ).weight.norm()


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("start", STARTS)
def test_the_weights_below_are_untouched_and_with_adapters_off_they_are_the_reference(root, start):
    model, plain = started(root, start), llama()
    disturb(model)
    now = {n: p for n, p in model.base_model.model.named_parameters() if "lora_" not in n}
    for name, weight in plain.named_parameters():
        name = name if name in now else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(now.pop(name), weight), name
    assert not now
    assert not torch.allclose(scored(model), scored(plain), atol=0.1)
    with as_reference(model) as reference:
        torch.testing.assert_close(scored(reference), scored(plain), rtol=0, atol=0)


def test_only_the_policy_learns(root):
    model = started(root, "pissa", lora_dropout=0.3)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {name for name, _ in model.named_parameters() if f".{POLICY}." in name}
    layer = lora_layers(model)["lm_head"]
    for adapter in (POLICY, START):  # dropout would take away what the twin does not add
        assert not hasattr(layer.lora_dropout[adapter], "p")
    assert model.peft_config[POLICY].lora_dropout == 0


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("start", STARTS)
def test_the_factors_are_those_of_peft(start, scaling):
    """peft takes from the weights what it gives to the adapter, and so says what that is."""
    settings = {**LORA, **SCALINGS[scaling], "task_type": "CAUSAL_LM"}
    ours = get_peft_model(llama(), LoraConfig(**settings))
    start_at(ours, STARTS[start])
    theirs = get_peft_model(llama(), LoraConfig(**settings, init_lora_weights=start))
    for name, layer in lora_layers(theirs).items():
        b, a = factors(lora_layers(ours)[name])
        expected_b, expected_a = factors(layer)
        sign = (b * expected_b).sum(0).sign()  # singular vectors have none
        torch.testing.assert_close(b, expected_b * sign, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(a, expected_a * sign[:, None], rtol=1e-3, atol=1e-4)
        taken = llama().get_submodule(name).weight - layer.get_base_layer().weight
        torch.testing.assert_close(layer.scaling[POLICY] * b @ a, taken, rtol=1e-3, atol=1e-4)


def test_the_nearest_of_a_rank_shares_its_values_evenly():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    found = low_rank(weight, 2, 3.0)
    u, values, v = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(3.0 * found.b @ found.a, (u[:, :2] * values[:2]) @ v[:2])
    torch.testing.assert_close(found.b.T @ found.b, torch.diag(values[:2] / 3.0))
    torch.testing.assert_close(found.a @ found.a.T, torch.diag(values[:2] / 3.0))
    # Eckart-Young: what is left has the other values
    left = torch.linalg.svdvals(weight - 3.0 * found.b @ found.a)
    torch.testing.assert_close(left[:3], values[2:])


# --- kept and found again ------------------------------------------------------------------------


def saved(model, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    save_adapter(model, folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("start", STARTS)
def test_what_is_saved_belongs_on_the_unchanged_root(root, tmp_path, start, scaling):
    model = disturb(started(root, start, **SCALINGS[scaling]))
    said = scored(model)
    assert not torch.allclose(said, scored(llama()), atol=0.1)
    folder = saved(model, tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 2 * LORA["r"] and config["init_lora_weights"] is True
    shapes = {tuple(x.shape) for x in load_file(folder / "adapter_model.safetensors").values()}
    assert {min(shape) for shape in shapes} == {2 * LORA["r"]}
    # float32: the same products in another order
    near = {"rtol": 0, "atol": 1e-4}
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root), str(folder))
    torch.testing.assert_close(scored(plain), said, **near)
    section = {"model_args": {"pretrained_model_name_or_path": str(folder)}}
    torch.testing.assert_close(scored(get_model(section, trainable=False)[0]), said, **near)
    again, _ = get_model(section | {"use_lora": True, "lora_config": LORA})
    torch.testing.assert_close(scored(again), said, **near)
    start_equals_target(again, again.target)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_it_is_exported_like_any_other(root, tmp_path, form):
    model = disturb(started(root, "pissa", use_rslora=True))
    folder = saved(model, tmp_path)
    written = export(str(folder), form)
    exported = AutoModelForCausalLM.from_pretrained(root if form == "adapter" else written)
    if form == "adapter":
        exported = PeftModel.from_pretrained(exported, written)
    torch.testing.assert_close(scored(exported), scored(model), rtol=0, atol=1e-4)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("mode", ["merge", "stack", "continue"])
def test_a_second_request_stands_on_it(root, tmp_path, mode):
    model = disturb(started(root, "olora"))
    said = scored(model)
    folder = saved(model, tmp_path)
    second = LoRAModelForCausalLM.from_pretrained(str(folder), LORA, lineage=mode)
    torch.testing.assert_close(scored(second), said, rtol=0, atol=1e-4)
    disturb(second)
    assert not torch.allclose(scored(second), said, atol=0.1)
    with as_reference(second) as reference:
        torch.testing.assert_close(scored(reference), said, rtol=0, atol=1e-4)


def test_what_is_loaded_is_what_was_saved_bit_by_bit(root, tmp_path):
    model = disturb(started(root, "pissa"))
    folder = saved(model, tmp_path)
    again = started(root, "olora")
    load_with_start(again, folder)
    assert has_start(again) and not has_start(get_peft_model(llama(), LoraConfig(**LORA)))
    for (name, p), q in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == q[0] and torch.equal(p, q[1]), name


# --- other kinds of layers and weights -----------------------------------------------------------


@pytest.mark.parametrize("start", STARTS)
def test_layers_that_are_stored_the_other_way_round(tmp_path, start):
    """GPT-2's weights are [in, out]."""
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": VOCABULARY}
    base = GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.3)).eval()
    base.save_pretrained(tmp_path / "root")
    targets = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    model = get_peft_model(base, LoraConfig(**targets, r=3, task_type="CAUSAL_LM"))
    before = Probe.take(model)
    start_at(model, STARTS[start])
    assert before.difference(model)[0] < 1e-4
    for layer in lora_layers(model).values():
        b, a = factors(layer)
        # the best of its rank takes a good part away
        left = layer.get_base_layer().weight.T - layer.scaling[POLICY] * b @ a
        if start == "pissa":
            values = torch.linalg.svdvals(layer.get_base_layer().weight)
            assert float(left.norm()) == pytest.approx(float(values[3:].norm()), rel=1e-3)


def test_bfloat16_weights_are_taken_apart_in_float32():
    base = llama(dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(**LORA, task_type="CAUSAL_LM"))
    before = Probe.take(model)
    seen = []

    def start(name, weight, rank, scaling):
        seen.append(weight.dtype)
        return STARTS["pissa"](name, weight, rank, scaling)

    start_at(model, start)
    assert set(seen) == {torch.float32}
    assert model.base_model.model.lm_head.base_layer.weight.dtype == torch.bfloat16
    # bfloat16 has steps of 0.8 %, and there are two layers of them
    assert before.difference(model)[1] < 0.04


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["stack", "continue"])
def test_an_adapter_starts_from_the_weights_only_where_it_is_the_only_one(root, tmp_path, mode):
    folder = saved(disturb(LoRAModelForCausalLM.from_pretrained(root, LORA)), tmp_path)
    with pytest.raises(InputError) as error:
        LoRAModelForCausalLM.from_pretrained(
            str(folder), {**LORA, "init_lora_weights": "pissa"}, lineage=mode
        )
    assert "\n" not in str(error.value)
    assert ("Set model.lineage=merge" if mode == "stack" else "Leave out one of the two") in str(
        error.value
    )


def test_weights_that_are_quantised_are_refused():
    model = get_peft_model(llama(), LoraConfig(**LORA, task_type="CAUSAL_LM"))
    model.base_model.model.is_quantized = True
    with pytest.raises(InputError, match="cannot start from quantised weights. Leave out"):
        start_at(model, STARTS["pissa"])
    assert list(model.peft_config) == [POLICY]


def test_a_start_may_be_anything(root):
    """Factors that have nothing to do with the weights begin at the target all the same."""
    model = LoRAModelForCausalLM.from_pretrained(root, LORA)

    def start(_name, weight, rank, _scaling):
        return Factors(torch.ones(len(weight), rank), torch.ones(rank, weight.shape[1]))

    start_at(model, start)
    assert model.target.difference(model)[0] < 1e-3
