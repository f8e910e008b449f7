"""Batches, their order and the memory of the machine change no answer."""

import logging

import numpy as np
import pytest
import tiny
import torch

from unlora.data.chat_encoding import Encoded
from unlora.errors import InputError
from unlora.evals.passes import batching, generate, gradient_norm, hidden, score
from unlora.evals.passes.batching import Budget, answer_all, halvings

LENGTHS = [5, 1, 9, 2, 7, 7, 3]
CUTS = [{"batch_size": 1}, {"batch_size": 3}, {"tokens": 1}, {"tokens": 40}, {}]


@pytest.fixture
def rows():
    made = tiny.rows(LENGTHS)
    return [*made, *tiny.rows([4], prompt=9), made[2]]


def scores(model, rows, tokenizer, **cut):
    found = score(model, rows, [""] * len(rows), pad_id=0, end_id=None, **cut)
    return [np.stack((one.logp, one.hit, one.mean, one.var)) for one in found]


def texts(model, rows, tokenizer, **cut):
    prompts = [row.input_ids for row in rows]
    return generate(model, prompts, tokenizer, end_ids=[9], max_new_tokens=6, **cut)


def norms(model, rows, tokenizer, **cut):
    return gradient_norm(model, rows, pad_id=0, **cut)


def states(model, rows, tokenizer, **cut):
    return hidden(model, rows, pad_id=0, **cut)


PASSES = {"score": scores, "generate": texts, "gradient_norm": norms, "hidden": states}


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, str):
            assert one == other
        else:
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("name", PASSES)
def test_batches_and_order_change_no_answer(name, rows, tokenizer):
    model, ask = tiny.adapted(), PASSES[name]
    expected = ask(model, rows, tokenizer, batch_size=1)
    assert len({str(one) for one in expected}) == len(rows) - 1  # one of them is there twice
    order = np.random.default_rng(0).permutation(len(rows))
    for cut in CUTS:
        assert_same(ask(model, rows, tokenizer, **cut), expected)
        mixed = ask(model, [rows[i] for i in order], tokenizer, **cut)
        assert_same(mixed, [expected[i] for i in order])


def with_memory_for(model, sequences):
    """A model that runs out of memory on more rows at a time; the numbers of rows are listed."""
    original, seen = model.forward, []

    def forward(input_ids=None, **kwargs):
        seen.append(len(input_ids))
        if len(input_ids) > sequences:
            raise torch.OutOfMemoryError("simulated")
        return original(input_ids=input_ids, **kwargs)

    model.forward = forward
    return seen


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("name", PASSES)
def test_where_memory_runs_out_batches_are_halved_and_no_row_is_lost(name, rows, tokenizer, caplog):
    model, ask = tiny.llama(), PASSES[name]
    expected = ask(model, rows, tokenizer)
    seen = with_memory_for(model, 2)
    with caplog.at_level(logging.WARNING):
        found = ask(model, rows, tokenizer)
    assert_same(found, expected)
    assert max(seen) > 2 and "Memory ran out on" in caplog.text
    assert caplog.text.count("Memory ran out") == sum(size > 2 for size in seen) <= 3


@pytest.mark.parametrize("name", PASSES)
def test_a_single_row_that_does_not_fit_is_said_in_words(name, rows, tokenizer):
    model = tiny.llama()
    PASSES[name](model, rows[:2], tokenizer)
    with_memory_for(model, 0)
    with pytest.raises(InputError, match="a single row of .* tokens.*max_length"):
        PASSES[name](model, rows, tokenizer)


def test_what_was_too_much_once_is_not_tried_again():
    sizes, failed = [], []

    def ask(batch):
        sizes.append(len(batch))
        if len(batch) > 8:
            failed.append(len(batch))
            raise torch.OutOfMemoryError("simulated")
        return batch

    items = list(range(256))
    with halvings() as said:  # for the manifest
        found = answer_all(items, [1] * 256, ask, tiny.llama(), budget=Budget(rows=64))
    assert found == items
    assert said == [f"Memory ran out on {n} rows; going on with half" for n in (64, 32, 16)]
    assert failed == [64, 32, 16] and sizes[3:] == [8] * 32


@torch.no_grad()
def test_rows_of_a_tree_that_does_not_fit_are_read_apart(tokenizer, caplog):
    model, base = tiny.llama(), tiny.rows([6])[0]
    answers = tiny.rows([5] * 4, prompt=0, seed=1)
    rows = [
        Encoded(base.input_ids + answer.input_ids, [-100] * 10 + answer.labels)
        for answer in answers
    ]
    expected = scores(model, rows, tokenizer)
    original, widths = model.forward, []

    def forward(input_ids=None, **kwargs):
        widths.append(input_ids.shape[1])
        if input_ids.shape[1] > 14:  # the last token of a row is not read
            raise torch.OutOfMemoryError("simulated")
        return original(input_ids=input_ids, **kwargs)

    model.forward = forward
    assert_same(scores(model, rows, tokenizer), expected)
    assert widths == [10 + 4 * 4, 14, 14, 14, 14]
    longer = [Encoded([*row.input_ids, 3], [*row.labels, 3]) for row in rows]
    with pytest.raises(InputError, match="a single row of 30 tokens"):
        scores(model, longer, tokenizer)


def test_other_errors_of_a_model_are_not_taken_for_a_lack_of_memory(rows):
    def ask(batch):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="multiplied"):
        answer_all(rows, [1] * len(rows), ask, tiny.llama(), budget=Budget())


@pytest.mark.parametrize("error", [
    RuntimeError("CUDA out of memory. Tried to allocate"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory"),
    MemoryError(),
])  # fmt: skip
def test_a_lack_of_memory_has_many_names(error):
    def ask(batch):
        if len(batch) > 1:
            raise error
        return [-batch[0]]

    items = list(range(9))
    assert answer_all(items, [1] * 9, ask, tiny.llama(), budget=Budget()) == [-i for i in items]


def test_a_batch_keeps_within_its_budget_and_rows_are_of_like_length():
    seen = []

    def ask(batch):
        seen.append(batch)
        return batch

    sizes = np.random.default_rng(0).integers(1, 50, 60).tolist()
    found = answer_all(sizes, sizes, ask, tiny.llama(), budget=Budget(tokens=100, rows=8))
    assert found == sizes
    assert all(len(batch) <= 8 and max(batch) * len(batch) <= 100 for batch in seen)
    assert [size for batch in seen for size in batch] == sorted(sizes, reverse=True)
    seen.clear()
    answer_all(sizes, sizes, ask, tiny.llama(), budget=Budget(tokens=100), share=0.5)
    assert all(len(batch) == 1 or max(batch) * len(batch) <= 50 for batch in seen)


def test_the_budget_is_found_from_sizes_alone():
    assert batching.found_budget(tiny.llama()) == batching.TOKENS_ON_CPU


def test_progress_tells_every_token_once(rows, tokenizer):
    rows = [*rows, Encoded([5, 6, 7], [-100] * 3)]
    told = []
    scores(tiny.llama(), rows, tokenizer, batch_size=2, progress=told.append)
    assert sum(told) == sum(len(row.input_ids) for row in rows)
    told.clear()
    texts(tiny.llama(), rows, tokenizer, batch_size=2, progress=told.append)
    assert sum(told) == sum(len(row.input_ids) + 6 for row in rows)
