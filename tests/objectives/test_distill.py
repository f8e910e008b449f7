import math

import pytest
import torch

from unlora.objectives import distill


def plain(target, logits):
    return -(target.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def logits_of(tokens, *, without=None):
    drawn = torch.randn(tokens, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    return drawn if without is None else drawn.roll(1, 0).index_fill(1, without, -math.inf)


@pytest.mark.parametrize("at_once", [1, 22, 1 << 20])
def test_cross_entropy_a_few_tokens_at_a_time_is_the_plain_one(monkeypatch, at_once):
    monkeypatch.setattr(distill, "AT_ONCE", at_once)
    logits = logits_of(7).requires_grad_()
    target = logits_of(7, without=torch.tensor([3]))
    share = torch.arange(1.0, 8.0).double()
    wanted = plain(target, logits)
    (slope,) = torch.autograd.grad((share * wanted).sum(), logits)
    found = distill._cross_entropy(target.clone(), logits)
    (said,) = torch.autograd.grad((share * found).sum(), logits)
    assert not torch.allclose(found, plain(logits, logits))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(said, slope, rtol=1e-10, atol=1e-14)


def test_no_tokens_have_no_cross_entropy():
    logits = logits_of(0).requires_grad_()
    found = distill._cross_entropy(logits_of(0), logits)
    assert found.shape == (0,)
    found.sum().backward()
    assert logits.grad.shape == (0, 11)


def test_the_gradient_of_a_cross_entropy_is_had_once():
    logits = logits_of(2).requires_grad_()
    found = distill._cross_entropy(logits_of(2), logits).sum()
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        found.backward()
