"""Rows leave the batch when they have ended; what is written is the same."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    MistralConfig,
)

from unlora.data.encoded import Encoded
from unlora.evals.passes import Sampling, generate, generation
from unlora.evals.passes.declaration import PassInput, Settings
from unlora.evals.passes.decoding import decoding_of
from unlora.evals.records import Scored
from unlora.forward import IGNORE_INDEX

STEPS = 10
SHAPE = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}


@pytest.fixture
def prompts():
    return [row.input_ids for row in tiny.rows([3, 1, 6, 2, 8, 4])]


@torch.no_grad()
def alone(model, prompt, ends, steps=STEPS):
    """Token by token, everything read again for each."""
    tokens = []
    for _ in range(steps):
        token = int(model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].argmax())
        if token in ends:
            break
        tokens.append(token)
    return tokens


def text(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def write(model, prompts, tokenizer, **changes):
    settings = {"end_ids": [], "max_new_tokens": STEPS} | changes
    return generate(model, prompts, tokenizer, **settings)


def watch(model):
    """(rows, tokens of a row) of every forward pass, once it is known how the model decodes."""
    decoding_of(model.eval(), pad_id=0)
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    return seen


def test_rows_leave_the_batch_when_they_have_ended(model, prompts, tokenizer):
    model.eval()
    free = [alone(model, prompt, []) for prompt in prompts]
    ends = {free[0][2], free[3][5], free[4][0]}  # tokens that some rows write early
    expected = [alone(model, prompt, ends) for prompt in prompts]
    lengths = [len(tokens) for tokens in expected]
    assert min(lengths) == 0 and len(set(lengths)) > 2
    seen = watch(model)
    found = write(model, prompts, tokenizer, end_ids=list(ends))
    assert found == [text(tokenizer, tokens) for tokens in expected]
    going = [sum(length >= step for length in lengths) for step in range(STEPS)]
    # prompts are read once, one after another; then one token of each row that has not ended
    assert seen == [(1, sum(map(len, prompts)))] + [(n, 1) for n in going[1:] if n]


def test_a_row_that_waits_takes_the_slot_of_one_that_has_ended(model, prompts, tokenizer):
    model.eval()
    free = [alone(model, prompt, []) for prompt in prompts]
    ends = {free[0][2], free[3][5], free[4][0]}
    expected = [text(tokenizer, alone(model, prompt, ends)) for prompt in prompts]
    seen = watch(model)
    reported = []
    found = write(
        model, prompts, tokenizer, end_ids=list(ends), batch_size=2, progress=reported.append
    )
    assert found == expected
    assert max(rows for rows, new in seen if new == 1) == 2  # slots
    assert sum(new > 1 for _, new in seen) > 3  # prompts are read when a slot is free
    assert sum(reported) == sum(len(prompt) + STEPS for prompt in prompts)


def test_what_all_prompts_begin_with_is_read_once(model, prompts, tokenizer):
    model.eval()
    alike = [[7, 8, 9, 10, *prompt] for prompt in prompts]
    expected = [text(tokenizer, alone(model, prompt, [])) for prompt in alike]
    seen = watch(model)
    assert write(model, alike, tokenizer) == expected
    assert seen[0] == (1, 4 + sum(map(len, prompts)))


def test_a_known_beginning_is_read_and_not_written(model, prompts, tokenizer):
    model.eval()
    free = [alone(model, prompt, []) for prompt in prompts]
    ends = {free[0][2], free[3][5]}
    expected = [text(tokenizer, alone(model, prompt, ends)) for prompt in prompts]
    begins = [free[0][:3], [], free[2][:4], free[3][:2], free[4], free[5][:1]]
    seen = watch(model)
    assert write(model, prompts, tokenizer, end_ids=list(ends), begins=begins) == expected
    known = [len(prompts[n]) + len(begins[n]) for n in (1, 2, 3, 5)]  # 0 has ended, 4 is whole
    assert seen[0] == (1, sum(known))


def test_a_row_ends_with_a_stop_string(model, prompts, tokenizer):
    model.eval()
    free = [text(tokenizer, alone(model, prompt, [])) for prompt in prompts]
    row, stop = next(
        (n, letter)
        for n, whole in enumerate(free)
        for letter in whole[1:-1]
        if letter.isascii() and letter.isprintable()
    )
    seen = watch(model)
    found = write(model, prompts, tokenizer, stop=[stop])
    for ours, whole in zip(found, free, strict=True):
        assert whole.startswith(ours) and (stop in ours) == (stop in whole)
        assert (ours == whole) or ours.endswith(stop)
    assert found[row] != free[row] and min(rows for rows, _ in seen) < 6


def test_what_is_written_is_not_cleaned_up(model, prompts, tokenizer):
    """Versions of transformers differ in whether they would; a tokenizer may wish for it."""
    expected = write(model, prompts, tokenizer)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.clean_up_tokenization_spaces = True
    space, stop = tokenizer(" .").input_ids[:2]
    assert write(model, prompts, tokenizer) == expected
    spoken = model.lm_head.register_forward_hook(_saying([space, stop]))
    assert write(model, prompts[:1], tokenizer, max_new_tokens=2) == [" ."]
    spoken.remove()


def _saying(script):
    """A hook that makes a model write these tokens."""
    steps = iter(script)

    def hook(_module, _args, logits):
        return torch.nn.functional.one_hot(torch.tensor(next(steps)), logits.shape[-1]) + 0 * logits

    return hook


def test_a_thought_is_left_out_and_one_without_an_end_is_no_text(model, prompts, tokenizer, caplog):
    model.eval()
    free = [alone(model, prompt, []) for prompt in prompts]
    end = free[0][3]  # of a thought, to some rows

    def answer_of(written):
        return written[written.index(end) + 1 :] if end in written else None

    expected = [answer_of(tokens) for tokens in free]
    assert None in expected and expected[0]
    wanted = [answer if answer is None else text(tokenizer, answer) for answer in expected]
    assert write(model, prompts, tokenizer, answer_of=answer_of) == wanted
    assert f"{expected.count(None)} of 6 answers were still in their thought" in caplog.text
    # a stop string ends an answer, not a thought
    stop = text(tokenizer, free[0][:3])
    assert stop in text(tokenizer, free[0]) and stop not in wanted[0]
    found = write(model, prompts[:1], tokenizer, answer_of=answer_of, stop=[stop])
    assert found == wanted[:1]


def test_all_rows_ended_end_the_pass(model, prompts, tokenizer):
    seen = watch(model)
    assert write(model, prompts, tokenizer, end_ids=list(range(tiny.VOCABULARY))) == [""] * 6
    assert len(seen) == 1
    assert write(model, [], tokenizer) == [] and len(seen) == 1


def test_a_large_vocabulary_makes_small_batches(model, prompts, tokenizer, monkeypatch):
    expected, seen = write(model, prompts, tokenizer), watch(model)
    monkeypatch.setattr(generation, "LOGITS_ON_CPU", 2 * tiny.VOCABULARY + 1)
    for batch_size in (None, 5):
        assert write(model, prompts, tokenizer, batch_size=batch_size) == expected
    assert max(rows for rows, _ in seen) == 2


def test_draws_are_the_same_in_any_company(model, prompts, tokenizer):
    keys = [(7, n) for n in range(len(prompts))]
    first = write(model, prompts, tokenizer, sampling=Sampling(keys), end_ids=[5, 6, 7])
    for batch_size in (1, 4):
        again = write(
            model, prompts, tokenizer, sampling=Sampling(keys), end_ids=[5, 6, 7],
            batch_size=batch_size,
        )  # fmt: skip
        assert again == first
    # rows that leave early shift no draw of the others
    ended = write(model, [prompts[0], *prompts], tokenizer, end_ids=[5, 6, 7],
                  sampling=Sampling([(1, 1), *keys]))  # fmt: skip
    assert ended[1:] == first
    assert write(model, prompts, tokenizer, sampling=Sampling([(8, n) for n in range(6)])) != first


def test_a_row_that_dies_while_it_writes_leaves_and_takes_nobody_with_it(
    model, prompts, tokenizer, caplog
):
    model.eval()
    free = [alone(model, prompt, []) for prompt in prompts]
    poison = free[2][1]
    hurt = [poison in [*p, *t[:-1]] for p, t in zip(prompts, free, strict=True)]
    assert hurt[2] and not all(hurt)
    model.get_input_embeddings().weight.data[poison] = float("nan")
    found = write(model, prompts, tokenizer)
    assert [one is None for one in found] == hurt
    for one, tokens, dead in zip(found, free, hurt, strict=True):
        assert dead or one == text(tokenizer, tokens)
    assert f"not finite on {sum(hurt)} of 6 rows" in caplog.text


@pytest.mark.default_cases(2)
@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**tiny.SHAPE, sliding_window=5),
        GPT2Config(
            vocab_size=tiny.VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            initializer_range=0.3,
            tie_word_embeddings=False,
        ),
        BloomConfig(**SHAPE, n_head=4, initializer_range=0.3),
    ],
    ids=lambda config: config.model_type,
)
def test_other_architectures_write_as_they_do_alone(config, prompts, tokenizer):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    free = [alone(model, prompt, []) for prompt in prompts]
    ends = {free[0][2], free[3][4]}
    expected = [text(tokenizer, alone(model, prompt, ends)) for prompt in prompts]
    assert len(set(expected)) > 3
    assert write(model, prompts, tokenizer, end_ids=list(ends)) == expected


def test_how_far_an_answer_is_what_the_model_writes():
    prompt, answer = [5, 6], [7, 8, 9]
    row = Encoded([*prompt, *answer], [IGNORE_INDEX, IGNORE_INDEX, *answer])

    def beginning(hits, row=row):
        numbers = np.zeros(len(hits), dtype=np.float32)
        scored = Scored(numbers, np.array(hits, dtype=bool), numbers, numbers, "", True)
        return generation._beginning(prompt, row, scored)

    assert beginning([True, False, True]) == [7]
    assert beginning([False, True, True]) == []
    assert beginning([True, True, True]) == answer
    assert beginning([]) == []  # the model was dead on it
    other = Encoded([5, 4, *answer], row.labels)
    assert beginning([True, True, True], other) == []  # it was asked something else


def test_what_scoring_knows_of_several_answers_is_used(tokenizer):
    row = Encoded([5, 6, 7, 8], [IGNORE_INDEX, IGNORE_INDEX, 7, 8])
    other = Encoded([5, 6, 9, 9], [IGNORE_INDEX, IGNORE_INDEX, 9, 9])
    source = SimpleNamespace(prompts=[[5, 6], [5, 6]], answers=[[row, other], []])
    zeros = np.zeros(2, dtype=np.float32)
    records = [
        [Scored(zeros, np.array(hits), zeros, zeros, "", True) for hits in pair]
        for pair in ([[True, False], [False, True]], [])
    ]
    data = PassInput(source, [0, 1], Settings(), scored=records)
    assert generation._begins(data) == [[7], []]
    assert generation._begins(PassInput(source, [0, 1], Settings())) == [[], []]
