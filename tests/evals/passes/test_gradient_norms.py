"""Gradient norms against autograd, row by row, on the weights that the model answers by."""

import copy

import pytest
import tiny
import torch
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM
from transformers.pytorch_utils import Conv1D

from unlora.data.chat_encoding import Encoded
from unlora.errors import InputError
from unlora.evals.passes import gradient_norm
from unlora.evals.passes import gradient_norms as module
from unlora.forward.architecture import decoder_layers

ROWS = [*tiny.rows([5, 1, 9, 2]), *tiny.rows([4], prompt=7, seed=1)]
ROUNDING = 1e-6  # a loss is summed over the vocabulary in float32
CONV = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}


def small(kind):
    torch.manual_seed(0)
    shape = {"vocab_size": tiny.VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}
    if kind == "gpt2":
        found = GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.3))
    elif kind == "opt":  # shows its linear layers all rows as one
        found = OPTForCausalLM(
            OPTConfig(
                vocab_size=tiny.VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2,
                num_attention_heads=4, word_embed_proj_dim=32, max_position_embeddings=64,
                init_std=0.3,
            )
        )  # fmt: skip
    else:
        found = tiny.llama()
    return found.double()


def literal(model, rows, end=""):
    """The norm of the gradient of the mean loss of each row, by autograd."""
    found = []
    weights = [
        m.weight
        for name, m in decoder_layers(model).named_modules()
        if isinstance(m, (torch.nn.Linear, Conv1D)) and name.endswith(end)
    ]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(True)
    for row in rows:
        logits = model(torch.tensor([row.input_ids])).logits[0, :-1]
        labels = torch.tensor(row.labels[1:])
        loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100)
        gradients = torch.autograd.grad(loss, weights)
        found.append(float(sum(g.square().sum() for g in gradients).sqrt()))
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    return found


def ask(model, rows=ROWS, **changes):
    return gradient_norm(model, rows, pad_id=0, **changes)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_the_norm_is_that_of_autograd(kind):
    model = small(kind).eval()
    expected = literal(model, ROWS)
    assert max(expected) > 2 * min(expected)
    assert ask(model) == pytest.approx(expected, rel=ROUNDING)
    assert ask(model, batch_size=2) == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize("way", ["tokens", "weights"])
def test_both_ways_to_a_norm_are_the_same(way, monkeypatch):
    model = small("llama").eval()
    rows = tiny.rows([2, 1] if way == "tokens" else [60, 50], prompt=2)
    ways = []
    original = module._square

    def square(seen, gradient):
        time, wide, out = seen.shape[1], seen.shape[2], gradient.shape[2]
        ways.append("tokens" if time * (wide + out) < wide * out else "weights")
        return original(seen, gradient)

    monkeypatch.setattr(module, "_square", square)
    assert ask(model, rows) == pytest.approx(literal(model, rows), rel=ROUNDING)
    assert way in ways


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"use_rslora": True}, CONV])
def test_an_adapter_and_the_same_merged_have_the_same_norm(lora):
    kind = "gpt2" if lora is CONV else "llama"
    model = tiny.adapted(small(kind), **lora).double().eval()
    merged = copy.deepcopy(model).merge_and_unload()
    expected = literal(merged, ROWS)
    assert ask(merged) == pytest.approx(expected, rel=ROUNDING)
    assert ask(model) == pytest.approx(ask(merged), rel=ROUNDING)
    assert ask(model) != pytest.approx(ask(small(kind).eval()), rel=1e-2)


def test_two_adapters_on_one_another():
    model = tiny.adapted(small("llama")).double()
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    for name, weight in model.named_parameters():
        if "lora_B.second" in name:
            weight.data.fill_(0.05)
    model.base_model.set_adapter(["default", "second"])
    both = copy.deepcopy(model).merge_and_unload()
    one = copy.deepcopy(model)
    one.base_model.set_adapter(["default"])
    assert ask(model) == pytest.approx(literal(both, ROWS), rel=ROUNDING)
    assert ask(model) != pytest.approx(ask(one), rel=1e-3)


@pytest.mark.parametrize("model", [small("llama"), tiny.adapted(small("llama")).double()])
def test_the_declared_modules_alone_count(model):
    merged = copy.deepcopy(model).merge_and_unload() if hasattr(model, "peft_config") else model
    expected = literal(merged, ROWS, "down_proj")
    for name in (["down_proj"], "down_proj", ["mlp.down_proj"]):
        assert ask(model, modules=name) == pytest.approx(expected, rel=ROUNDING)
    assert ask(model) > expected
    names = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    assert ask(model, modules=names) == pytest.approx(ask(model), rel=1e-12)
    assert len(module.declared(model, ["q_proj", "self_attn.q_proj"])) == 2


def test_a_name_that_fits_nothing_is_refused():
    with pytest.raises(InputError, match="names 'dwn_proj', but .* Known: down_proj, gate_proj"):
        ask(tiny.llama(), modules=["q_proj", "dwn_proj"])
    with pytest.raises(InputError, match="names 'lm_head'"):  # not of the decoder layers
        ask(tiny.adapted(), modules="lm_head")
    with pytest.raises(InputError, match="names 'lora_A'"):
        ask(tiny.adapted(), modules=["lora_A"])


def test_a_module_that_sees_other_tokens_is_refused():
    model = small("llama")
    proj = model.model.layers[0].mlp.down_proj
    original = proj.forward
    model.model.layers[0].mlp.forward = lambda x: proj(x.new_ones(2, 48)).sum() + 0 * x
    assert original is not None
    with pytest.raises(InputError, match="not shown every token.*gradient_modules"):
        ask(model)
    assert ask(model, modules=["q_proj"])


def test_nothing_to_score_and_a_dead_model_are_nan(caplog):
    nothing = Encoded([5, 6, 7], [-100] * 3)
    first = Encoded([5, 6], [5, -100])  # the first token has no prediction
    model = small("llama")
    found = ask(model, [nothing, ROWS[0], first, Encoded([], [])])
    assert found[1] == pytest.approx(ask(model, ROWS[:1])[0], rel=1e-9)
    assert [x != x for x in found] == [True, False, True, True]
    model.get_input_embeddings().weight.data[ROWS[2].input_ids[0]] = float("nan")
    found = ask(model)
    assert [x != x for x in found] == [row.input_ids[0] == ROWS[2].input_ids[0] for row in ROWS]
    assert "not finite on 1 of 5 rows" in caplog.text
    assert ask(model, []) == []


@pytest.mark.parametrize("make", [tiny.llama, tiny.adapted])
def test_it_leaves_the_model_as_it_was(make):
    model = make().train()
    model.get_input_embeddings().weight.requires_grad_(True)
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    weights = copy.deepcopy(model.state_dict())
    kept = next(model.parameters()).grad
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()]
    state = torch.get_rng_state()
    ask(model)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), state)
    first, *others = model.parameters()
    assert first.grad is kept and bool((kept == 1).all()) and all(p.grad is None for p in others)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    # and under no_grad, as an evaluation may be
    with torch.no_grad():
        assert ask(model) == ask(model.eval())


def test_dropout_has_no_say():
    model = tiny.adapted(lora_dropout=0.5)
    assert ask(model.train()) == ask(model.eval())
