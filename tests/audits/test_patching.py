"""States of one model read by another, against layers called one after the other by hand."""

import copy

import numpy as np
import pytest
import tiny
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from unlora.audits.attack import ATTACKS
from unlora.audits.attacks.depth import depth
from unlora.audits.patching import answer_states, patched_logps
from unlora.data.encoded import Encoded
from unlora.evals.passes import score

ROWS = [*tiny.rows([3, 1, 5]), *tiny.rows([2], prompt=9, seed=1)]


def gpt2(seed):
    torch.manual_seed(seed)
    shape = {"vocab_size": tiny.VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.3))


def places(row):
    return [t - 1 for t, label in enumerate(row.labels) if label != -100 and t]


def plain(model, rows=ROWS):
    records = score(model, rows, [""] * len(rows), pad_id=0, end_id=None)
    return [-record.loss for record in records]


@torch.no_grad()
def states_literally(model, row):
    """transformers' own hidden states; the last of them are after the norm."""
    hidden = model(torch.tensor([row.input_ids]), output_hidden_states=True).hidden_states
    return [states[0, places(row)] for states in hidden[1:-1]]


@torch.no_grad()
def patched_literally(target, row, own, layer):
    """A Llama's layers one after the other, states replaced behind one of them."""
    ids = torch.tensor([row.input_ids])
    x, positions = target.model.embed_tokens(ids), torch.arange(ids.shape[1])[None]
    rotary = target.model.rotary_emb(x, positions)
    size = ids.shape[1]
    mask = torch.full((size, size), float("-inf"), dtype=x.dtype).triu(1)[None, None]
    for number, block in enumerate(target.model.layers):
        x = block(x, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        x = x[0] if isinstance(x, tuple) else x
        if number == layer:
            for place, state in zip(places(row), own, strict=True):
                x[0, place] = state
    logps = target.lm_head(target.model.norm(x))[0].log_softmax(-1)
    return float(torch.stack([logps[t, row.input_ids[t + 1]] for t in places(row)]).mean())


@pytest.mark.parametrize("make", [lambda: tiny.llama(), lambda: tiny.adapted(), lambda: gpt2(0)])
def test_a_models_own_states_change_nothing(make):
    model = make().train()
    states = answer_states(model, ROWS, pad_id=0)
    found = patched_logps(model, ROWS, states, pad_id=0)
    assert found.shape == (2, 4) and model.training
    for layer in found:
        assert layer == pytest.approx(plain(model), abs=1e-6)
    assert not any(module._forward_hooks for module in model.modules())


def test_states_are_those_behind_each_layer_where_an_answer_is_predicted():
    model = tiny.llama().double().eval()
    for row, states in zip(ROWS, answer_states(model, ROWS, pad_id=0), strict=True):
        assert states.shape == (2, len(places(row)), 32)
        (expected,) = states_literally(model, row)
        assert torch.allclose(states[0], expected, rtol=0, atol=1e-12)
    assert answer_states(tiny.llama(dtype=torch.bfloat16), ROWS, 0)[0].dtype == torch.float32


def test_another_models_states_are_read_by_the_layers_above():
    own, target = (tiny.llama(seed=seed).double().eval() for seed in (1, 2))
    states = answer_states(own, ROWS, pad_id=0)
    found = patched_logps(target, ROWS, states, pad_id=0)
    for n, row in enumerate(ROWS):
        for layer in range(2):
            expected = patched_literally(target, row, states[n][layer], layer)
            assert found[layer, n] == pytest.approx(expected, abs=1e-10)
        # behind the last layer there are norm and head alone
        with torch.no_grad():
            logps = target.lm_head(target.model.norm(states[n][-1])).log_softmax(-1)
        answer = [row.input_ids[t + 1] for t in places(row)]
        expected = float(logps[torch.arange(len(answer)), answer].mean())
        assert found[-1, n] == pytest.approx(expected, abs=1e-10)
    assert np.abs(found - np.array(plain(target))).max() > 0.1


def test_rows_without_a_scored_token_have_no_number():
    model = tiny.llama()
    rows = [Encoded([1, 2, 3], [-100] * 3), ROWS[0], Encoded([], [])]
    states = answer_states(model, rows, pad_id=0)
    assert [len(one[0]) for one in states] == [0, 3, 0]
    found = patched_logps(model, rows, states, pad_id=0)
    assert np.isnan(found).tolist() == [[True, False, True]] * 2
    assert found[0, 1] == pytest.approx(plain(model, ROWS[:1])[0], abs=1e-6)


def test_batches_change_nothing(monkeypatch):
    own, target = tiny.llama(seed=1), tiny.adapted()
    states = answer_states(own, ROWS, pad_id=0)
    whole = patched_logps(target, ROWS, states, pad_id=0)
    monkeypatch.setattr("unlora.audits.patching.LOGITS_AT_ONCE", tiny.VOCABULARY)
    alone = answer_states(own, ROWS, pad_id=0)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(alone, states, strict=True))
    assert patched_logps(target, ROWS, copy.copy(alone), pad_id=0) == pytest.approx(whole, abs=1e-5)


def test_depth_is_the_mean_over_layers():
    assert ATTACKS["depth"].kind == "patched"
    found = depth(np.array([[-1.0, -2.0, np.nan], [-3.0, -6.0, np.nan]]))
    assert found[:2].tolist() == [-2, -4] and np.isnan(found[2])
