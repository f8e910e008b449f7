"""Masks by the keys of tokens: drawn as torch's are, and the same however a row is batched."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from unlora.forward import keyed_dropout
from unlora.forward.keyed_dropout import KeyedDropout, keep_keys, keys_of, row_keys, token_keys

P, MODULES, WIDTH, ROWS, TIME = 0.05, 6, 64, 40, 25


def keys(numbers, *parts, time=TIME):
    offsets = torch.arange(len(numbers)) * time
    return keys_of([row_keys(torch.tensor(numbers), *parts)], [offsets], len(numbers) * time)


def mask(number=0, *, rows=range(ROWS), step=3, seed=0, p=P, dtype=torch.float32, width=WIDTH):
    """What one module drops of these rows: 1 where it does, [rows, time, width]."""
    module = KeyedDropout(p, number, MODULES, seed)
    ones = torch.ones(len(rows), TIME, width, dtype=dtype)
    with token_keys(keys([*rows], seed, step)):
        return (module(ones) == 0).double()


def correlation(one, other):
    a, b = (x - P for x in (one, other))
    return float((a * b).mean() / (P * (1 - P)))


# of n independent numbers, a mean of products of two strays by 1 / sqrt(n)
CLOSE = 5 / math.sqrt(ROWS * TIME * WIDTH)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_the_share_that_is_dropped_is_p_and_the_mean_is_kept(p):
    dropped = mask(p=p)
    assert float(dropped.mean()) == pytest.approx(
        p, abs=5 * math.sqrt(p * (1 - p) / dropped.numel())
    )
    module = KeyedDropout(p, 0, MODULES, 0)
    with token_keys(keys(range(ROWS), 0, 3)):
        found = module(torch.ones(ROWS, TIME, WIDTH))
    assert found.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_row_place_and_channel_is_dropped_as_often(axis):
    dropped = torch.stack([mask(number) for number in range(MODULES)]).mean(0)
    others = [other for other in range(3) if other != axis]
    shares = dropped.mean(others)
    spread = math.sqrt(P * (1 - P) / (MODULES * dropped.numel() / len(shares)))
    assert float((shares - P).abs().max()) < 5 * spread
    assert float(shares.std()) == pytest.approx(spread, rel=0.5)


@pytest.mark.parametrize(
    "other",
    [{"number": 1}, {"step": 4}, {"seed": 1}, {"rows": range(ROWS, 2 * ROWS)}],
    ids=["module", "step", "seed", "row"],
)
def test_masks_of_others_are_independent(other):
    assert abs(correlation(mask(), mask(**other))) < CLOSE
    assert correlation(mask(), mask()) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_neighbours_are_independent(axis):
    dropped = mask()
    assert abs(correlation(dropped, dropped.roll(1, dims=axis))) < 2 * CLOSE


def test_a_row_drops_the_same_wherever_it_stands():
    whole = mask(rows=[4, 7, 9, 2])
    assert torch.equal(mask(rows=[9, 4])[0], whole[2])
    assert torch.equal(mask(rows=[9, 4])[1], whole[0])
    # packed: row 7, cut to 5 tokens, then row 2 and row 9 in a sequence of 60
    offsets, lengths = torch.tensor([3, 8, 34]), (5, 25, 25)
    packed = keys_of([row_keys(torch.tensor([7, 2, 9]), 0, 3)], [offsets], 60)
    with token_keys(packed):
        found = KeyedDropout(P, 0, MODULES, 0)(torch.ones(1, 60, WIDTH))[0] == 0
    for begin, length, number in zip(offsets, lengths, (1, 3, 2), strict=True):
        assert torch.equal(found[begin : begin + length].double(), whole[number][:length])


def test_what_rows_begin_with_drops_the_same_once_or_in_every_row():
    rows, beginning = [row_keys(torch.tensor([7, 2, 9]), 0, 3)], (4, torch.tensor(123))
    padded = keys_of(rows, [torch.tensor([0, 10, 20])], 30, beginning=beginning)
    # rows of 10, 6 and 7 tokens, what they begin with once
    once = keys_of(rows, [torch.tensor([0, 6, 8])], 4 + 6 + 2 + 3, once=4, beginning=beginning)
    assert torch.equal(padded.tokens[:4], padded.tokens[10:14])
    assert not set(padded.tokens[4:10].tolist()) & set(padded.tokens[14:20].tolist())
    expected = [*padded.tokens[:10], *padded.tokens[14:16], *padded.tokens[24:27]]
    assert once.tokens.tolist() == [int(key) for key in expected]


def test_masks_do_not_depend_on_the_dtype_or_on_which_tokens_are_asked_for():
    whole = mask()
    assert torch.equal(mask(dtype=torch.bfloat16), whole)
    some = torch.tensor([5, 700, 31])
    with token_keys(keys(range(ROWS), 0, 3).select(some)):
        found = KeyedDropout(P, 2, MODULES, 0)(torch.ones(3, WIDTH)) == 0
    assert torch.equal(found.double(), mask(2).flatten(0, 1)[some])


def test_the_gradient_is_that_of_what_was_kept():
    module = KeyedDropout(0.5, 0, MODULES, 0).double()
    with token_keys(keys([1, 2], 0, 3, time=3)):
        inputs = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(module, inputs)
        module(inputs).sum().backward()
        assert torch.equal(inputs.grad, module(torch.ones_like(inputs)))


def test_keys_of_one_number_are_those_of_a_tensor():
    numbers = [0, 1, -1, 2**40, -(2**62)]
    assert [keyed_dropout._scalar(n % 2**64) for n in numbers] == keyed_dropout.mixed(
        torch.tensor(numbers)
    ).tolist()


def test_a_mask_in_bits_is_that_in_numbers():
    """As it is kept on a GPU."""
    whole, bits = (
        keyed_dropout._tosses(0, 0.5, 7, d, torch.device("cpu"))[:9]
        for d in (torch.float64, torch.bool)
    )
    assert torch.equal(whole, 2.0 * bits)


def test_without_keys_or_with_those_of_other_tokens_it_is_torchs():
    module, inputs = KeyedDropout(P, 0, MODULES, 0), torch.ones(4, 9, WIDTH)
    torch.manual_seed(0)
    expected = nn.Dropout(P)(inputs)
    for given in (None, keys([1, 2], 0, 3)):
        torch.manual_seed(0)
        with token_keys(given):
            assert torch.equal(module(inputs), expected)
    assert module.eval()(inputs) is inputs


class Model(nn.Module):
    """Two layers that are computed again for the gradient, as in transformers."""

    def __init__(self, reentrant):
        super().__init__()
        self.dropout = KeyedDropout(0.5, 0, MODULES, 0)
        self.layer = nn.Linear(WIDTH, WIDTH)

        def compute(function, *args):
            return checkpoint(function, *args, use_reentrant=reentrant)

        self._gradient_checkpointing_func = compute

    def forward(self, x):
        return self._gradient_checkpointing_func(lambda x: self.layer(self.dropout(x)), x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_that_is_computed_again_drops_the_same(reentrant):
    """Two passes before one backward: each has its own keys."""
    torch.manual_seed(0)
    model = Model(reentrant)
    inputs = torch.randn(2, TIME, WIDTH, requires_grad=True)

    def loss(first, second):
        total = torch.zeros(())
        for numbers in (first, second):
            with token_keys(keys(numbers, 0, 3)):
                total = total + model(inputs).square().sum()
        return total

    with pytest.raises(RuntimeError, match="without the keys of its tokens"):
        loss([1, 2], [3, 4]).backward()
    model.zero_grad()
    keep_keys(model)
    keep_keys(model)  # once
    loss([1, 2], [3, 4]).backward()
    again = model.layer.weight.grad.clone()
    model.zero_grad()
    model._gradient_checkpointing_func = lambda function, *args: function(*args)
    loss([1, 2], [3, 4]).backward()
    torch.testing.assert_close(again, model.layer.weight.grad)
