import math

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from unlora.errors import InputError
from unlora.objectives import TERMS, objective
from unlora.outputs import Outputs


def said(*rows_of_logps: list[float]) -> Outputs:
    """Outputs whose token log-probabilities are these (vocabulary of 2, label 0)."""
    logps = torch.tensor([x for row in rows_of_logps for x in row])
    row = torch.tensor([i for i, row in enumerate(rows_of_logps) for _ in row])
    logits = torch.stack([logps, torch.log1p(-logps.exp())], -1)
    return Outputs(logits, torch.zeros_like(row), row, len(rows_of_logps))


def value(name: str, *outputs: Outputs, **hyper: float) -> list[float]:
    term = TERMS[name].configure(**hyper)
    return term(dict(zip(term.views, outputs, strict=True))).tolist()


def test_gradient_ascent_by_hand():
    # minimising log p is ascending on -log p
    assert value("GradAscent", said([-1.0, -3.0], [-0.5])) == pytest.approx([-1, -3, -0.5])


def test_retain_nll_by_hand():
    assert value("NLL", said([-1.0, -3.0])) == pytest.approx([1, 3])


def test_kl_by_hand():
    # policy p = (1/2, 1/2), reference q = (1/4, 3/4):
    # sum q log(q/p) = 1/4 log(1/2) + 3/4 log(3/2)
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    got = value("KL", said([math.log(0.5)]), said([math.log(0.25)]))
    assert got == pytest.approx([expected], rel=1e-5)


def test_npo_by_hand():
    # log-ratio of the row: (-1 - 3) - (-1 - 1) = -2; -2/b log sigmoid(2b) at b = 0.5
    got = value("NPO", said([-1.0, -3.0]), said([-1.0, -1.0]), beta=0.5)
    assert got == pytest.approx([4 * math.log1p(math.exp(-1))], rel=1e-5)


def test_npo_at_the_start_is_two_over_beta_log_two():
    start = said([-1.0, -3.0])
    assert value("NPO", start, start, beta=0.1) == pytest.approx([20 * math.log(2)])


def test_npo_with_small_beta_has_the_gradient_of_gradient_ascent():
    policy = said([-1.0, -2.0], [-0.5])
    policy.logits.requires_grad_()
    npo = TERMS["NPO"].configure(beta=1e-4)
    npo({"policy_forget": policy, "reference_forget": said([-1.0, -2.0], [-0.5])}).sum().backward()
    by_npo, policy.logits.grad = policy.logits.grad, None
    again = Outputs(policy.logits, policy.labels, policy.row, policy.rows)
    TERMS["GradAscent"]({"policy_forget": again}).sum().backward()
    torch.testing.assert_close(by_npo, policy.logits.grad, rtol=1e-3, atol=1e-5)


def test_simnpo_by_hand():
    # mean log p = -2; -2/b log sigmoid(-b (-2 + d)) = -2/b log sigmoid(b) at d = 1
    got = value("SimNPO", said([-1.0, -3.0]), beta=2.5, delta=1.0)
    assert got == pytest.approx([2 / 2.5 * math.log1p(math.exp(-2.5))], rel=1e-5)


def test_dpo_by_hand():
    # won: -1 - (-2) = 1, lost: -4 - (-2) = -2; -2/b log sigmoid(3b) at b = 0.1
    got = value("DPO", said([-4.0]), said([-2.0]), said([-0.5, -0.5]), said([-1.0, -1.0]), beta=0.1)
    assert got == pytest.approx([20 * math.log1p(math.exp(-0.3))], rel=1e-5)


def random_outputs(seed: int, lengths: tuple[int, ...] = (3, 5, 1)) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    return Outputs(
        torch.randn(tokens, 7, generator=generator, dtype=torch.float64),
        torch.randint(7, (tokens,), generator=generator),
        torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        len(lengths),
    )


@pytest.mark.parametrize("name", list(TERMS))
def test_every_objective_declares_its_unit_and_keeps_it(name):
    term = TERMS[name]
    values = term({view: random_outputs(i) for i, view in enumerate(term.views)})
    assert values.shape == {"tokens": (9,), "rows": (3,)}[term.unit]
    assert values.isfinite().all(), "one-token answers included"


@pytest.mark.parametrize("name", list(TERMS))
def test_the_gradient_reaches_the_policy(name):
    term = TERMS[name]
    views = {view: random_outputs(i) for i, view in enumerate(term.views)}
    for view, outputs in views.items():
        outputs.logits.requires_grad_(view.startswith("policy"))
    term(views).sum().backward()
    for view, outputs in views.items():
        assert (outputs.logits.grad is not None) == view.startswith("policy"), view


def test_unknown_parameter_names_the_nearest():
    with pytest.raises(
        InputError,
        match=r"Unknown parameter of objective NPO 'betta'. Did you mean 'beta'\? Known: beta.",
    ):
        TERMS["NPO"].configure(betta=1)


def test_a_word_where_a_number_belongs_is_refused():
    with pytest.raises(InputError, match="beta of objective NPO is 'small'; it must be a number"):
        TERMS["NPO"].configure(beta="small")


def test_unknown_objective_names_the_nearest():
    with pytest.raises(InputError, match=r"Unknown objective 'SimPNO'. Did you mean 'SimNPO'\?"):
        TERMS["SimPNO"]


def test_a_pass_that_does_not_exist_fails_where_it_is_written():
    with pytest.raises(TypeError, match="policy_forgot"):

        @objective("typo")
        def typo(policy_forgot: Outputs) -> Float[Tensor, " rows"]: ...


def test_a_term_without_a_unit_fails_where_it_is_written():
    with pytest.raises(TypeError, match="per scored token or per row"):

        @objective("scalar")
        def scalar(policy_forget: Outputs) -> Tensor: ...
