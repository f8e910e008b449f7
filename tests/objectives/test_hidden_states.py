"""Hidden states, as RMU asks for them: the forward pass really ends, in any architecture."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import LORA, SHAPE, VOCABULARY, llama, qwen2, rows
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from views import random_draws

from unlora.data.collate import collate
from unlora.errors import InputError
from unlora.forward.architecture import check_layer, decoder_layers, output_embedding
from unlora.forward.forward_pass import ask, ask_all
from unlora.forward.outputs import Hidden
from unlora.model.reference import as_reference, rest_above
from unlora.objectives import TERMS

DEPTH = 3
BATCH = collate(rows([3, 1, 5]), pad_id=0)


def ask_hidden(model: nn.Module, batch: dict[str, Tensor], layer: int) -> Hidden:
    """The states after one decoder layer, counted from 0."""
    return ask_all(model, [(Hidden, batch)], layer=layer)[0]


def small(**names: str) -> dict[str, int]:
    """The usual tiny shape under an architecture's own names."""
    return {"vocab_size": VOCABULARY, **{key: SHAPE[usual] for key, usual in names.items()}}


def gpt2() -> nn.Module:
    shape = small(n_embd="hidden_size", n_head="num_attention_heads")
    return GPT2LMHeadModel(GPT2Config(**shape, n_layer=DEPTH, initializer_range=0.3))


def gpt_neox() -> nn.Module:
    usual = ("hidden_size", "intermediate_size", "num_attention_heads")
    shape = small(**{name: name for name in usual})
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shape, num_hidden_layers=DEPTH))


def opt() -> nn.Module:
    shape = small(
        hidden_size="hidden_size",
        word_embed_proj_dim="hidden_size",
        ffn_dim="intermediate_size",
        num_attention_heads="num_attention_heads",
    )
    return OPTForCausalLM(OPTConfig(**shape, num_hidden_layers=DEPTH))


# architecture: how it is made, where its layers are, what an adapter goes on
ARCHITECTURES = {
    "llama": (lambda: llama(num_hidden_layers=DEPTH), "model.layers", LORA),
    "qwen2": (lambda: qwen2(num_hidden_layers=DEPTH), "model.layers", LORA),
    "gpt2": (gpt2, "transformer.h", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "gpt_neox": (gpt_neox, "gpt_neox.layers", {"target_modules": ["query_key_value"]}),
    "opt": (opt, "model.decoder.layers", {"target_modules": ["q_proj", "fc2"]}),
}


def made(architecture: str, *, lora: bool) -> tuple[nn.Module, nn.ModuleList]:
    """A model and its layers, found by their name."""
    torch.manual_seed(0)
    make, place, targets = ARCHITECTURES[architecture]
    model = make()
    layers = model.get_submodule(place)
    if lora:
        settings = {key: x for key, x in targets.items() if key != "target_modules"}
        names = [name for name in targets["target_modules"] if name != "lm_head"]
        model = get_peft_model(
            model, LoraConfig(**settings, target_modules=names, init_lora_weights=False)
        )
    return model.eval(), layers


class Wrapper(nn.Module):
    """As DDP wraps a model: everything but ``forward`` is under ``module``."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def states_in_a_whole_pass(model: nn.Module, layer: nn.Module) -> Tensor:
    """What a layer answers at the scored tokens, while all layers run."""
    seen = []
    handle = layer.register_forward_hook(lambda _m, _args, told: seen.append(told))
    model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"])
    handle.remove()
    told = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return torch.cat([told[row, 4 : 4 + n] for row, n in enumerate([3, 1, 5])])


@pytest.mark.default_cases(3)
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped"])
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_runs_above_the_layer(architecture, lora, wrapped):
    model, layers = made(architecture, lora=lora)
    calls, projected = [], []
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda _m, _args, number=number: calls.append(number))
    output_embedding(model).register_forward_hook(
        lambda _m, args, _o: projected.append(args[0].numel())
    )
    assert decoder_layers(Wrapper(model) if wrapped else model) is layers
    for number, layer in enumerate(layers):
        expected = states_in_a_whole_pass(model, layer)
        assert calls == list(range(DEPTH)), "all of them run in a whole pass"
        calls.clear(), projected.clear()
        told = ask_hidden(Wrapper(model) if wrapped else model, BATCH, number)
        assert calls == list(range(number + 1))
        assert projected == [0], "nothing is projected to the vocabulary"
        torch.testing.assert_close(told.states, expected, rtol=1e-5, atol=1e-5)
        assert told.lengths.tolist() == [3, 1, 5]
        assert told.labels.tolist() == BATCH["labels"][BATCH["labels"] >= 0].tolist()
        calls.clear()


def test_layers_are_counted_as_transformers_counts_them():
    model, _ = made("llama", lora=True)
    with torch.no_grad():
        whole = model(**{k: BATCH[k] for k in ("input_ids", "attention_mask")},
                      output_hidden_states=True)  # fmt: skip
    scored = BATCH["labels"] >= 0
    for layer in range(DEPTH - 1):  # transformers gives the last one's states after the norm
        told = ask_hidden(model, BATCH, layer).states
        # number 0 is the embedding
        torch.testing.assert_close(told, whole.hidden_states[layer + 1][scored], atol=1e-5, rtol=0)
        assert not torch.allclose(told, whole.hidden_states[layer][scored], atol=1e-2)


# --- the model is the same afterwards ------------------------------------------------------------


def fingerprint(model: nn.Module) -> list:
    """Which modules a model has, and how many hooks hang on each."""
    return [
        (name, id(module), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


@pytest.mark.default_cases(4)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_is_left_unchanged(architecture):
    model, _layers = made(architecture, lora=True)
    before, logits = fingerprint(model), ask(model, BATCH).logits
    ask_hidden(model, BATCH, 0)
    assert fingerprint(model) == before
    assert torch.equal(ask(model, BATCH).logits, logits)


def test_the_model_is_left_unchanged_when_the_pass_fails():
    model, layers = made("llama", lora=True)
    before, logits = fingerprint(model), ask(model, BATCH).logits
    beyond = BATCH | {"input_ids": BATCH["input_ids"] + VOCABULARY}
    with pytest.raises(IndexError):
        ask_hidden(model, beyond, 1)  # below the layer
    handle = layers[1].mlp.register_forward_pre_hook(lambda _m, _args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask_hidden(model, BATCH, 1)  # in the layer
    handle.remove()
    assert fingerprint(model) == before
    assert torch.equal(ask(model, BATCH).logits, logits)


def test_the_reference_is_asked_in_the_same_way():
    model, _layers = made("llama", lora=True)
    plain, _ = made("llama", lora=False)  # the weights that the adapter lies on
    before = fingerprint(model)
    with as_reference(model) as reference:
        told = ask_hidden(reference, BATCH, 1)
    assert not told.states.requires_grad
    torch.testing.assert_close(told.states, ask_hidden(plain, BATCH, 1).states, rtol=0, atol=1e-5)
    assert not torch.allclose(told.states, ask_hidden(model, BATCH, 1).states, atol=1e-2)
    assert fingerprint(model) == before


# --- a layer that is not there -------------------------------------------------------------------


@pytest.mark.parametrize("layer", [DEPTH, 99, -1])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_layer_that_is_not_there_is_refused(architecture, layer):
    model, _ = made(architecture, lora=True)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(InputError) as refused:
        check_layer(model, layer)
    assert str(refused.value) == (
        f"trainer.method_args.layer is {layer}, but the model has layers 0 to 2. "
        "A quarter of the depth is usual: trainer.method_args.layer=0."
    )
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_layer_that_is_there_is_taken(architecture):
    model, _ = made(architecture, lora=True)
    for layer in range(DEPTH):
        check_layer(model, layer)


# --- gradients -----------------------------------------------------------------------------------


def rmu_gradient(model: nn.Module, layer: int) -> dict[str, Tensor | None]:
    term = TERMS["RMU"].configure(layer=layer)
    model.zero_grad(set_to_none=True)
    told = ask_hidden(model, BATCH, layer)
    drawn = {
        name: x.to(told.states) for name, x in random_draws(term, SHAPE["hidden_size"]).items()
    }
    term({"policy_forget": told}, drawn).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_the_gradient_reaches_every_adapter_up_to_the_layer_and_none_above(architecture):
    model, layers = made(architecture, lora=True)
    below = {id(p) for layer in layers[:2] for p in layer.parameters()}
    parameters = dict(model.named_parameters())
    found = rmu_gradient(model, 1)
    for name, slope in found.items():
        reached = slope is not None and bool(slope.abs().max() > 0)
        assert reached == (id(parameters[name]) in below), name
    rest_above(model, 1)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, slope in found.items() if slope is not None
    }, "what rests is what has no gradient"


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model, layers = made("llama", lora=True)
    model.train()
    model.enable_input_require_grads()  # as the trainer does; re-entrant checkpointing needs it
    calls = []
    layers[0].mlp.register_forward_pre_hook(lambda _m, _args: calls.append(1))
    usual = rmu_gradient(model, 1)
    assert len(calls) == 1
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls.clear()
    recomputed = rmu_gradient(model, 1)
    assert len(calls) == 2, "the layer runs again on the way back"
    for name, slope in usual.items():
        if slope is None:
            assert recomputed[name] is None
        else:
            torch.testing.assert_close(recomputed[name], slope, rtol=1e-6, atol=1e-9)
