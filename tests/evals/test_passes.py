"""The passes against a slow literal implementation, and what must not matter to them."""

import copy

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from unlora.data.chat_encoding import Chat, Encoded
from unlora.evals.passes import Sampling, generate, loglikelihood, score, writing
from unlora.forward import vocab_stats

PAIRS = [
    ("Who wrote it?", "Ana Silva"),
    ("Where was the author born?", "The author was born in Oslo, Norway, near the harbour."),
    ("What?", "A novel"),
    ("What did they win in Lisbon?", "They won the golden lantern prize"),
    ("Who?", "x"),
]


@pytest.fixture
def chat(tokenizer):
    return Chat(tokenizer, {"apply_chat_template": True})


@pytest.fixture
def rows(chat):
    return [chat.encode(question, answer) for question, answer in PAIRS]


@pytest.fixture
def prompts(chat):
    return [chat.prompt(question) for question, _ in PAIRS]


def ask(model, rows, chat, **changes):
    settings = {"pad_id": chat.tokenizer.pad_token_id, "end_id": chat.end_id, "batch_size": 2}
    return score(model, rows, [str(i) for i in range(len(rows))], **settings | changes)


def write(model, prompts, chat, **changes):
    ends = [chat.end_id, chat.tokenizer.eos_token_id]
    settings = {"end_ids": ends, "max_new_tokens": 12, "batch_size": 2}
    return generate(model, prompts, chat.tokenizer, **settings | changes)


def literal(model, row):
    """One row, one token at a time, in float64."""
    columns = []
    for i in range(1, len(row.input_ids)):
        if row.labels[i] == -100:
            continue
        logits = model(torch.tensor([row.input_ids[:i]])).logits[0, -1]
        logps = logits.double().log_softmax(-1)
        p, label = logps.exp(), row.labels[i]
        mean = sum(p * logps)
        var = sum(p * (logps - mean) ** 2)
        columns.append([logps[label], float(logps.argmax() == label), mean, var])
    return np.array([[float(x) for x in column] for column in columns]).T


def assert_same(left, right, tolerance=1e-5):
    for a, b in zip(left, right, strict=True):
        assert (a.text, a.ended) == (b.text, b.ended)
        assert (a.hit == b.hit).all()
        for name in ("logp", "mean", "var"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=tolerance)


@torch.no_grad()
def test_score_equals_a_literal_implementation_in_float64(model, rows, chat):
    model.double()
    for record, row in zip(ask(model, rows, chat), rows, strict=True):
        logp, hit, mean, var = literal(model, row)
        # records are float32
        np.testing.assert_allclose(record.logp, logp, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(record.mean, mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(record.var, var, rtol=1e-5, atol=1e-5)
        assert (record.hit == (hit > 0)).all()
        assert record.ended


def test_batch_size_and_order_do_not_change_scores(model, rows, chat):
    one = ask(model, rows, chat, batch_size=1)
    assert len({len(record.logp) for record in one}) > 1  # rows of unequal length
    assert_same(one, ask(model, rows, chat, batch_size=5))
    backwards = score(
        model, rows[::-1], [str(i) for i in range(len(rows))][::-1],
        pad_id=chat.tokenizer.pad_token_id, end_id=chat.end_id, batch_size=3,
    )[::-1]  # fmt: skip
    assert_same(one, backwards)


@pytest.mark.default_cases(1)
@torch.no_grad()
@pytest.mark.parametrize("head", ["plain", "adapted", "capped"])
def test_blocks_of_the_vocabulary_and_whole_logits_give_the_same(
    head, model, rows, chat, monkeypatch
):
    if head == "adapted":
        model = get_peft_model(model, LoraConfig(**tiny.LORA))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
    if head == "capped":
        model.lm_head.register_forward_hook(lambda m, a, logits: 5 * (logits / 5).tanh())
    monkeypatch.setattr(vocab_stats, "BLOCK_ON_CPU", 37)
    monkeypatch.setattr(vocab_stats, "TOKENS_AT_ONCE", 11)
    blocks = ask(model, rows, chat, batch_size=5)
    # a head that does something else than multiply is found out, and asked whole
    assert loglikelihood._ABILITIES[model].blocks == (head != "capped")
    loglikelihood._ABILITIES[model] = loglikelihood.Abilities(trees=True, blocks=False)
    assert_same(blocks, ask(model, rows, chat, batch_size=5))
    for row, said in zip(rows, blocks, strict=True):
        assert said.logp == pytest.approx(literal(model.eval(), row)[0], abs=1e-4)


def test_the_pad_token_does_not_change_scores(model, rows, chat):
    assert_same(ask(model, rows, chat, pad_id=7), ask(model, rows, chat, pad_id=chat.end_id))


def test_a_row_without_scored_tokens_is_empty_and_does_not_reach_the_model(model, rows, chat):
    empty = Encoded([5, 6], [-100, -100])
    first, second, third = ask(model, [rows[0], empty, Encoded([], [])], chat)
    assert len(first.logp) and not len(second.logp) and not len(third.logp)
    assert ask(model, [], chat) == []


def test_plain_text_has_no_end_token(model, rows, chat):
    row = rows[0]
    cut = Encoded(row.input_ids[:-1], row.labels[:-1])
    record, with_end = ask(model, [cut, row], chat)
    assert not record.ended and len(record.without_end().logp) == len(record.logp)
    assert len(with_end.without_end().logp) == len(with_end.logp) - 1


def test_an_impossible_token_leaves_mean_and_variance_finite(model, rows, chat):
    plain = ask(model, rows, chat)
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]))
    head.bias.data[280:] = float("-inf")
    masked = ask(model, rows, chat)
    assert all(len(record.var) and np.isfinite(record.var).all() for record in masked)
    assert not np.allclose(masked[1].mean, plain[1].mean)
    assert None not in write(model, [[5, 6], [7]], chat)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_on_which_the_logits_are_not_finite_has_no_answer(
    value, model, rows, prompts, chat, caplog
):
    scores, texts = ask(model, rows, chat), write(model, prompts, chat)
    (token,) = chat.tokenizer("L").input_ids
    assert [token in row.input_ids for row in rows] == [False, False, False, True, False]
    model.get_input_embeddings().weight.data[token] = value
    found = ask(model, rows, chat, batch_size=5)
    assert not len(found[3].logp) and not len(found[3].hit)
    assert_same(found[:3] + found[4:], scores[:3] + scores[4:])
    assert write(model, prompts, chat, batch_size=5) == [*texts[:3], None, *texts[4:]]
    assert caplog.text.count("not finite on 1 of 5 rows") == 2


def literal_greedy(model, prompt, ends, steps):
    tokens = []
    for _ in range(steps):
        token = int(model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].argmax())
        if token in ends:
            break
        tokens.append(token)
    return tokens


@torch.no_grad()
def test_generation_is_greedy_for_any_batch_size_and_order(model, prompts, chat):
    model.eval()
    ends = [chat.end_id, chat.tokenizer.eos_token_id]
    expected = [
        chat.tokenizer.decode(literal_greedy(model, prompt, ends, 12), skip_special_tokens=True)
        for prompt in prompts
    ]
    assert len(set(expected)) > 1 and len({len(prompt) for prompt in prompts}) > 1
    for batch_size in (1, 2, 5):
        assert write(model, prompts, chat, batch_size=batch_size) == expected
    assert write(model, prompts[::-1], chat) == expected[::-1]


@torch.no_grad()
def test_generation_stops_at_an_end_token(model, prompts, chat):
    model.eval()
    tokens = literal_greedy(model, prompts[0], [], 12)
    stop = next(i for i, token in enumerate(tokens) if i > 2 and token not in tokens[:i])
    expected = chat.tokenizer.decode(tokens[:stop], skip_special_tokens=True)
    assert write(model, prompts, chat, end_ids=[tokens[stop]])[0] == expected


def test_the_models_own_generation_settings_have_no_say(model, prompts, chat):
    before = write(model, prompts, chat)
    leaky = model.generation_config
    leaky.do_sample, leaky.temperature, leaky.repetition_penalty = True, 5.0, 50.0
    leaky.no_repeat_ngram_size, leaky.suppress_tokens = 1, list(range(200))
    assert write(model, prompts, chat) == before
    assert model.generation_config is leaky


def test_passes_leave_the_model_as_it_was(model, rows, prompts, chat):
    model.train()
    model.model.layers[0].eval()  # a mode of its own
    modes = [module.training for module in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    ask(model, rows, chat)
    write(model, prompts, chat)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


class Wrapper(torch.nn.Module):
    """What distributed training puts around a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.default_cases(1)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")  # peft on merging
@pytest.mark.parametrize("tied", [True, False])
def test_wrappers_and_adapters_answer_like_the_model_inside(tied, rows, prompts, chat):
    model = tiny.llama(tied=tied)
    scores, texts = ask(model, rows, chat), write(model, prompts, chat)
    adapted = get_peft_model(model, LoraConfig(**tiny.LORA, init_lora_weights=True))
    for wrapped in (adapted, Wrapper(adapted)):  # a fresh adapter adds nothing
        assert_same(scores, ask(wrapped, rows, chat))
        assert write(wrapped, prompts, chat) == texts
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    assert write(Wrapper(adapted), prompts, chat) != texts
    assert not np.allclose(ask(adapted, rows, chat)[1].logp, scores[1].logp)


def drawn(model, prompts, chat, keys, *, temperature=1.0, top_p=1.0, **changes):
    return write(model, prompts, chat, sampling=Sampling(keys, temperature, top_p), **changes)


@pytest.mark.default_cases(1)
@torch.no_grad()
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (2.0, 1.0), (0.5, 1.0), (1.5, 0.7)])
def test_tokens_are_drawn_with_the_probabilities_of_the_model(
    temperature, top_p, model, prompts, chat
):
    draws = 4000
    p = (model(torch.tensor([prompts[0]])).logits[0, -1].double() / temperature).softmax(-1)
    falling, order = p.sort(descending=True)
    inside = order[: int((falling.cumsum(-1) < top_p).sum()) + 1].tolist()
    expected = {token: float(p[token] / p[inside].sum()) for token in inside}
    seen = []

    class Watch(writing._Draw):
        def __call__(self, logits, rows, step):
            chosen = super().__call__(logits, rows, step)
            seen.extend(chosen.tolist())
            return chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "_Draw", Watch)
        keys = [(0, i) for i in range(draws)]
        drawn(model, [prompts[0]] * draws, chat, keys, temperature=temperature, top_p=top_p,
              max_new_tokens=1, batch_size=500)  # fmt: skip
    assert len(seen) == draws and set(seen) <= set(expected)
    for token, share in expected.items():
        # five standard deviations of a count of draws
        error = 5 * (share * (1 - share) / draws) ** 0.5
        assert seen.count(token) / draws == pytest.approx(share, abs=error + 1 / draws)


@pytest.mark.slow
def test_a_draw_depends_on_its_key_alone(model, prompts, chat):
    keys = [(0, i, 7) for i in range(len(prompts))]
    state = torch.get_rng_state()
    alone = drawn(model, prompts, chat, keys, batch_size=1)
    assert alone != write(model, prompts, chat)
    assert drawn(model, prompts, chat, keys, batch_size=5) == alone
    assert drawn(model, prompts[::-1], chat, keys[::-1]) == alone[::-1]
    assert drawn(model, prompts, chat, [(1, *key[1:]) for key in keys]) != alone
    # equal questions under different keys, and under the same one
    first, second, third = drawn(model, [prompts[0]] * 3, chat, [(0, 0, 7), (0, 1, 7), (0, 0, 7)])
    assert first == third == alone[0] and second != first
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.slow
def test_cold_draws_are_greedy(model, prompts, chat):
    keys = [(i,) for i in range(len(prompts))]
    greedy = write(model, prompts, chat)
    assert drawn(model, prompts, chat, keys, temperature=2.0) != greedy
    assert drawn(model, prompts, chat, keys, temperature=1e-4) == greedy
    assert drawn(model, prompts, chat, keys, top_p=1e-9) == greedy


@torch.no_grad()
def test_answers_without_an_end_can_be_left_out(model, prompts, chat):
    model.eval()
    tokens = literal_greedy(model, prompts[0], [], 12)
    stop = next(i for i, token in enumerate(tokens) if i > 2 and token not in tokens[:i])
    texts = write(model, prompts, chat, end_ids=[tokens[stop]])
    whole = write(model, prompts, chat, end_ids=[tokens[stop]], only_ended=True)
    assert whole[0] == texts[0] and None in whole and None not in texts
    assert all(text in (None, other) for text, other in zip(whole, texts, strict=True))


def test_a_row_on_which_the_logits_are_not_finite_draws_nothing(model, prompts, chat, caplog):
    keys = [(i,) for i in range(len(prompts))]
    before = drawn(model, prompts, chat, keys)
    (token,) = chat.tokenizer("L").input_ids
    model.get_input_embeddings().weight.data[token] = float("nan")
    found = drawn(model, prompts, chat, keys, batch_size=5)
    assert found[3] is None and "not finite on" in caplog.text
    same = [text == other for text, other in zip(found, before, strict=True)]
    # another row may itself write the token that is broken now
    assert sum(same) >= 3
