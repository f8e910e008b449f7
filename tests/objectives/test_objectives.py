"""What every term declares and keeps, and how wrong terms and settings are refused."""

import pytest
import torch
from jaxtyping import Float
from torch import Tensor
from views import LONG, lengths_of, numbers, random_draws, random_views

from unlora.errors import InputError
from unlora.forward import IGNORE_INDEX
from unlora.forward.outputs import Hidden, Outputs
from unlora.objectives import TERMS, objective
from unlora.objectives.representation import unit_vector


@pytest.mark.parametrize("name", list(TERMS))
def test_every_objective_declares_its_unit_and_keeps_it(name):
    term = TERMS[name]
    values = term(random_views(term), random_draws(term))
    lengths = lengths_of(term.part)
    shapes = {"tokens": (sum(lengths),), "rows": (len(lengths),), "batches": ()}
    assert values.shape == shapes[term.unit]
    assert values.isfinite().all(), "one-token answers included"


@pytest.mark.parametrize("name", list(TERMS))
def test_the_gradient_reaches_every_number_of_the_policy(name):
    term = TERMS[name]
    views = random_views(term)
    term(views, random_draws(term)).sum().backward()
    asked = [view for view in views if view.startswith("policy")]
    assert asked, "a term that asks the policy nothing teaches it nothing"
    for view in asked:
        gradient = numbers(views[view]).grad
        assert gradient.isfinite().all()
        # BLADE and IHL have tokens with nothing left to learn, _upstream positions out of sight
        assert (gradient != 0).flatten(1).any(1).any(), view


@pytest.mark.parametrize("name", list(TERMS))
def test_a_term_counts_the_losses_it_returns(name):
    term = TERMS[name]
    labels = torch.full((3, 9), IGNORE_INDEX)
    for row, length in enumerate(lengths_of(term.part)):
        labels[row, 2 : 2 + length] = 1
    assert term.count(labels) == term(random_views(term), random_draws(term)).numel()


def test_what_is_left_out_is_not_counted():
    term = TERMS["CEU"].configure(ignore_first_n_answer_tokens=3)
    labels = torch.full((len(LONG), 9), IGNORE_INDEX)
    for row, length in enumerate(LONG):  # 3, 5 and 1 tokens: 0, 2 and 0 losses
        labels[row, 2 : 2 + length] = 1
    assert term.count(labels) == len(term(random_views(term))) == 2


def test_the_first_position_of_a_row_has_no_prediction_to_count():
    labels = torch.tensor([[5, 6, 7], [IGNORE_INDEX, 8, IGNORE_INDEX]])
    assert [TERMS[name].count(labels) for name in ("NLL", "NPO", "KL_upstream")] == [3, 2, 1]


def test_only_hidden_states_have_a_layer():
    assert TERMS["RMU"].configure(layer=3).layer == 3
    assert TERMS["NPO"].layer is None


def test_a_control_vector_is_a_unit_vector_that_the_seed_decides():
    drawn = unit_vector(64, 1)
    assert drawn.shape == (64,) and drawn.dtype == torch.float32
    assert float(drawn.norm()) == pytest.approx(1, abs=1e-6)
    assert (drawn >= 0).all() and drawn.std() > 0.01
    assert torch.equal(drawn, unit_vector(64, 1))
    assert not torch.equal(drawn, unit_vector(64, 2))


# --- what is refused -----------------------------------------------------------------------------


def test_unknown_parameter_names_the_nearest():
    with pytest.raises(
        InputError,
        match=r"Unknown parameter of objective NPO 'betta'. Did you mean 'beta'\? Known: beta.",
    ):
        TERMS["NPO"].configure(betta=1)


def test_a_word_where_a_number_belongs_is_refused():
    with pytest.raises(InputError, match="beta of objective NPO is 'small'; it must be a number"):
        TERMS["NPO"].configure(beta="small")


def test_half_a_layer_is_refused():
    with pytest.raises(InputError, match="layer of objective RMU is 3.5; it must be a whole"):
        TERMS["RMU"].configure(layer=3.5)


def test_what_is_drawn_cannot_be_configured():
    with pytest.raises(InputError, match="Unknown parameter of objective RMU 'control'"):
        TERMS["RMU"].configure(control=1.0)


def test_unknown_objective_names_the_nearest():
    with pytest.raises(InputError, match=r"Unknown objective 'SimPNO'. Did you mean 'SimNPO'\?"):
        TERMS["SimPNO"]


def test_a_pass_that_does_not_exist_fails_where_it_is_written():
    with pytest.raises(TypeError, match="policy_forgot"):

        @objective("typo")
        def typo(policy_forgot: Outputs) -> Float[Tensor, " rows"]: ...


def test_a_view_that_does_not_say_what_it_wants_fails_where_it_is_written():
    with pytest.raises(
        TypeError, match="policy_forget of vague must have one of the types TokenLogps, Outp"
    ):

        @objective("vague")
        def vague(policy_forget: Tensor) -> Float[Tensor, " rows"]: ...


def test_hidden_states_of_no_layer_fail_where_they_are_written():
    with pytest.raises(TypeError, match="nowhere looks at hidden states, so it needs a keyword"):

        @objective("nowhere")
        def nowhere(policy_forget: Hidden) -> Float[Tensor, " rows"]: ...


def test_a_term_without_a_unit_fails_where_it_is_written():
    with pytest.raises(TypeError, match="per scored token or per row"):

        @objective("scalar")
        def scalar(policy_forget: Outputs) -> Tensor: ...


def test_a_name_that_is_taken_fails_where_it_is_written():
    with pytest.raises(ValueError, match="'NPO' is already defined"):

        @objective("NPO")
        def again(policy_forget: Outputs) -> Float[Tensor, " rows"]: ...
