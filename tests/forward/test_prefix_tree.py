"""Rows that begin alike are read as one tree, and answer as if each was read alone."""

import numpy as np
import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
)

from unlora.data.chat_encoding import Encoded
from unlora.evals.passes import loglikelihood, score
from unlora.forward import IGNORE_INDEX, vocab_stats

SHAPE = tiny.SHAPE
GPT = {"vocab_size": tiny.VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}
WIDE = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "gpt2": GPT2Config(**GPT, n_positions=128, initializer_range=0.3),
    "neox": GPTNeoXConfig(**WIDE, intermediate_size=48, initializer_range=0.3),
}


def made(config, dtype=torch.float64, attention="sdpa"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.to(dtype).eval()


def tokens(rng, length):
    return rng.integers(1, tiny.VOCABULARY, length).tolist()


def row(prompt, answer):
    return Encoded(prompt + answer, [IGNORE_INDEX] * len(prompt) + answer)


def patterns():
    """Rows with every kind of common beginning, in no order."""
    rng = np.random.default_rng(0)
    one, other, third = (tokens(rng, n) for n in (9, 7, 5))
    answer = tokens(rng, 6)
    rows = [
        row(one, answer),
        row(one, answer),  # the same again
        row(one, answer[:3]),  # the beginning of another row
        row(one, answer[:1]),  # one token, which another row reads
        row(one, tokens(rng, 4)),  # another answer to the same question
        row(one[:5] + other, tokens(rng, 3)),  # the same template, another question
        row(one[:5] + other, tokens(rng, 1)),
        row(third, tokens(rng, 8)),  # nothing in common
        Encoded(one + answer, [IGNORE_INDEX] * 11 + answer[2:]),  # a beginning of other length
        Encoded(third + answer, [IGNORE_INDEX, *third[1:], *answer]),  # all but the first scored
    ]
    return [rows[i] for i in rng.permutation(len(rows))]


def ask(model, rows, **changes):
    settings = {"pad_id": 0, "end_id": None} | changes
    return score(model, rows, [""] * len(rows), **settings)


@torch.no_grad()
def literal(model, row):
    """The four numbers of the scored tokens of one row, that is read alone."""
    logps = model(torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)
    found = []
    for t in range(1, len(row.labels)):
        if row.labels[t] != IGNORE_INDEX:
            p, here, label = logps[t - 1].exp(), logps[t - 1], row.labels[t]
            mean = (p * here).sum()
            var = (p * (here - mean) ** 2).sum()
            found.append([here[label], float(here.argmax() == label), mean, var])
    return np.array([[float(x) for x in column] for column in zip(*found, strict=True)])


def assert_literal(model, rows, found, tolerance):
    for record, one in zip(found, rows, strict=True):
        logp, hit, mean, var = literal(model, one)
        assert (record.hit == (hit > 0)).all()
        for ours, theirs in ((record.logp, logp), (record.mean, mean), (record.var, var)):
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.fixture
def seen(monkeypatch):
    """The tokens of every tree, and the masks that reach a model."""
    found = {"trees": [], "tokens": 0, "masks": []}
    original, inputs = loglikelihood.trees, loglikelihood._Asker._inputs

    def trees(*args, **kwargs):
        answer = original(*args, **kwargs)
        found["trees"] += answer
        found["tokens"] += sum(len(tree.ids) for tree in answer)
        return answer

    def watched(self, batch, width):
        answer = inputs(self, batch, width)
        found["masks"].append(answer["attention_mask"].dim())
        return answer

    monkeypatch.setattr(loglikelihood, "trees", trees)
    monkeypatch.setattr(loglikelihood._Asker, "_inputs", watched)
    return found


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_tree_answers_as_its_rows_do_alone(name, attention, seen):
    model, rows = made(CONFIGS[name], attention=attention), patterns()
    # a softmax of eager attention is taken in float32, whatever the weights are
    rounds = attention == "eager" and name != "gpt2"
    found = ask(model, rows)
    assert_literal(model, rows, found, 1e-5 if rounds else 1e-9)
    assert loglikelihood._ABILITIES[model] == loglikelihood.Abilities(trees=True, blocks=True)
    read = [len(row.input_ids) - 1 for row in rows]
    assert len(seen["trees"]) < len(rows) and seen["tokens"] < 0.6 * sum(read)
    assert 4 in seen["masks"]


def test_random_rows_that_branch_anywhere(seen):
    model, rng = made(CONFIGS["llama"]), np.random.default_rng(1)
    for _ in range(10):
        rows = [row(tokens(rng, 3), tokens(rng, 4))]
        while len(rows) < 12:
            old = rows[rng.integers(len(rows))]
            kept = int(rng.integers(1, len(old.input_ids)))
            ids = old.input_ids[:kept] + tokens(rng, int(rng.integers(1, 5)))
            first = int(rng.integers(1, len(ids)))
            rows.append(row(ids[:first], ids[first:]))
        assert_literal(model, rows, ask(model, rows, batch_size=2), 1e-9)
    assert seen["tokens"] < sum(len(t.paths) * len(t.ids) for t in seen["trees"])


@pytest.mark.parametrize("rows", [patterns()[:1], [row([5], [7])], [row([5, 6], [7])] * 3])
def test_a_single_row_and_a_single_token(rows):
    model = made(CONFIGS["llama"])
    assert_literal(model, rows, ask(model, rows), 1e-9)


def test_trees_hold_every_row_once_and_no_more_tokens_than_allowed():
    rng = np.random.default_rng(0)
    start = tokens(rng, 20)
    read = [start + tokens(rng, 10) for _ in range(30)] + [tokens(rng, 70)]
    cheap = {"per_token": 1.0, "per_pair": 0.0}
    for most in (40, 100, 4096):
        found = loglikelihood.trees(read, **cheap, most=most)
        assert sorted(i for tree in found for i in tree.rows) == list(range(len(read)))
        for tree in found:
            assert len(tree.ids) <= most or len(tree.rows) == 1
            for i, path in zip(tree.rows, tree.paths, strict=True):
                assert [tree.ids[place] for place in path] == read[i]
    assert len(loglikelihood.trees(read, **cheap, most=0)) == len(read)
    # where attention over a long tree costs more than what is shared, rows stay apart
    short = [start[:2] + tokens(rng, 10) for _ in range(30)]
    assert len(loglikelihood.trees(short, **cheap, most=4096)) == 1
    assert len(loglikelihood.trees(short, per_token=1.0, per_pair=10.0, most=4096)) == len(short)
    assert loglikelihood.trees([], **cheap, most=100) == []


def broken(model, *, deaf_to):
    """A model that takes an argument and makes nothing of it."""
    original = model.forward

    def forward(input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        if deaf_to == "trees" and attention_mask is not None and attention_mask.dim() == 4:
            attention_mask = None
        if deaf_to == "positions":
            position_ids = None
        if deaf_to == "all but 2D" and attention_mask.dim() != 2:
            raise ValueError("too many values to unpack (expected 2)")
        return original(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )

    model.forward = forward
    return model


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("deaf_to", ["trees", "positions", "all but 2D"])
def test_a_model_that_would_answer_a_tree_wrongly_is_found_out(deaf_to, dtype, seen):
    rows = patterns()
    sound, deaf = (made(CONFIGS["llama"], dtype) for _ in range(2))
    expected = ask(sound, rows)
    before = seen["tokens"]
    found = ask(broken(deaf, deaf_to=deaf_to), rows)
    assert loglikelihood._ABILITIES[sound].trees and not loglikelihood._ABILITIES[deaf].trees
    assert seen["tokens"] - before == sum(len(row.input_ids) - 1 for row in rows)
    tolerance = 1e-4 if dtype is torch.float32 else 0.2
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.logp, theirs.logp, atol=tolerance)


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("seed", range(5))
def test_coarse_numbers_hide_no_row_before(seed):
    """Short convolutions see a little of the row before: less than bfloat16 rounds off."""
    torch.manual_seed(seed)
    config = Lfm2Config(
        vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1, pad_token_id=0,
        layer_types=["conv"] + ["full_attention"] * 3, conv_L_cache=3,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).bfloat16().eval()
    ask(model, patterns())
    assert not loglikelihood._ABILITIES[model].trees


def test_what_a_window_cannot_see_is_not_seen_in_a_tree_either(seen):
    """Of rows longer than the window each is read alone; of shorter ones no tree is longer."""
    rows = patterns()
    longest = max(len(row.input_ids) for row in rows) - 1
    for window in (6, longest, 1000):
        seen["trees"].clear()
        model = made(MistralConfig(**SHAPE, sliding_window=window))
        assert_literal(model, rows, ask(model, rows), 1e-9)
        most = max(len(tree.rows) for tree in seen["trees"])
        assert (most == 1) == (window < longest)
        assert all(len(tree.ids) <= window or most == 1 for tree in seen["trees"])


@pytest.mark.default_cases(2)
@pytest.mark.parametrize(
    "config",
    [
        GPTNeoConfig(
            vocab_size=tiny.VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, window_size=8,
            attention_types=[[["global", "local"], 1]], initializer_range=0.3,
        ),
        GPT2Config(**GPT, n_positions=24, initializer_range=0.3),  # its own mask has 24 columns
        FalconConfig(**WIDE, alibi=True, new_decoder_architecture=False, initializer_range=0.3),
        BloomConfig(**WIDE, initializer_range=0.3),
        MambaConfig(
            vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=2, initializer_range=0.3
        ),
        OPTConfig(
            **WIDE, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, init_std=0.3
        ),
    ],
    ids=lambda config: f"{config.model_type}",
)  # fmt: skip
def test_architectures_with_ways_of_their_own(config):
    model, rows = made(config, torch.float32, "eager"), patterns()
    assert_literal(model, rows, ask(model, rows), 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("block", [40, 1024])
def test_in_bfloat16_a_hit_is_what_greedy_search_would_write(block, monkeypatch):
    """Of words that are the likeliest greedy search takes the first, in whatever block they are."""
    monkeypatch.setattr(vocab_stats, "BLOCK_ON_CPU", block)
    model, rng = made(CONFIGS["llama"], torch.bfloat16), np.random.default_rng(3)
    half = tiny.VOCABULARY // 2
    model.lm_head.weight.data[half:] = model.lm_head.weight.data[:half]
    rows = []
    for _ in range(20):
        ids = tokens(rng, 6)
        likeliest = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        assert likeliest < half
        rows += [row(ids, [token]) for token in (likeliest, likeliest + half)]
    found = ask(model, rows)
    assert loglikelihood._ABILITIES[model].blocks
    assert [record.hit.tolist() for record in found] == [[True], [False]] * 20
    first, second = (np.array([record.logp[0] for record in found[n::2]]) for n in (0, 1))
    assert np.array_equal(first, second)
