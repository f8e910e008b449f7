"""Every objective against its paper's formula: by hand, and in plain loops (``papers.py``)."""

import math

import pytest
import torch
from papers import OTHER_SETTINGS, PAPERS, expected
from torch import Tensor
from views import (
    VOCABULARY,
    narrowed,
    narrowed_for,
    numbers,
    padded,
    plain,
    random_draws,
    random_views,
    said,
    states,
    value,
)

from unlora.errors import InputError
from unlora.forward import IGNORE_INDEX
from unlora.forward.outputs import Outputs, Padded
from unlora.objectives import TERMS, View

LOG2, LOG3 = math.log(2), math.log(3)
NONE = IGNORE_INDEX

# --- by hand: name, views, settings and drawn tensors, what must come out ------------------------

HALF = said([[0.5, 0.5]])
QUARTER = said([[0.25, 0.75]])
HALF_QUARTER_QUARTER = said([[0.5, 0.25, 0.25]])
HALF_THEN_QUARTER = said([[0.5, 0.5], [0.25, 0.75]])  # one row of log p = -3 log 2
SURE = 1 - 1e-12
BY_HAND = [
    # minimising log p is ascending on -log p; the second row has one token
    (
        "GradAscent",
        [said([[0.5, 0.5], [0.25, 0.75]], [[0.5, 0.5]])],
        {},
        [-LOG2, -2 * LOG2, -LOG2],
    ),
    ("GradDiff", [HALF_THEN_QUARTER], {}, [-LOG2, -2 * LOG2]),
    ("NLL", [HALF_THEN_QUARTER], {}, [LOG2, 2 * LOG2]),
    ("IdkNLL", [HALF_THEN_QUARTER], {}, [LOG2, 2 * LOG2]),
    # the task vector is learnt by likelihood; how much of it is subtracted comes afterwards
    ("Negation", [HALF_THEN_QUARTER], {"scale": 3.0}, [LOG2, 2 * LOG2]),
    ("PerTA", [HALF_THEN_QUARTER], {"scale": 3.0}, [LOG2, 2 * LOG2]),
    # policy p = (1/2, 1/2), reference q = (1/4, 3/4):
    # sum q log(q/p) = 1/4 log(1/2) + 3/4 log(3/2) = 3/4 log 3 - log 2; the other way it is
    # 1/2 log 2 + 1/2 log(2/3), something else
    ("KL", [HALF, QUARTER], {}, [0.75 * LOG3 - LOG2]),
    # p = 1/4: p ** 2 log p = -2 log 2 / 16
    ("WGA", [QUARTER], {"beta": 2.0}, [-LOG2 / 8]),
    # p = 1/4: (1/4) ** 2 * (3/4) ** 1 * log(1/4) = -6/64 log 2
    ("SatImp", [QUARTER], {"beta1": 2.0, "beta2": 1.0}, [-6 / 64 * LOG2]),
    # log p of the row is -3 log 2, of the reference -2 log 2, so the ratio is 1/2:
    # -2/b log sigmoid(b log 2) = -2 log(2/3) at b = 1, and at b = 2 it is -log(4/5)
    (
        "NPO",
        [HALF_THEN_QUARTER, said([[0.5, 0.5], [0.5, 0.5]])],
        {"beta": 1.0},
        [2 * math.log(3 / 2)],
    ),
    (
        "NPO",
        [HALF_THEN_QUARTER, said([[0.5, 0.5], [0.5, 0.5]])],
        {"beta": 2.0},
        [math.log(5 / 4)],
    ),
    # where nothing is forgotten yet it is 2/b log 2
    ("NPO", [HALF_THEN_QUARTER, HALF_THEN_QUARTER], {"beta": 0.1}, [20 * LOG2]),
    # mean log p = -3/2 log 2, delta = 1/2 log 2: -2/b log sigmoid(b log 2) at b = 1
    ("SimNPO", [HALF_THEN_QUARTER], {"beta": 1.0, "delta": LOG2 / 2}, [2 * math.log(3 / 2)]),
    # lost: log(1/4) - log(1/2) = -log 2, won: log(1/2) - log(1/4) = log 2, so with b = 1/2
    # -2/b log sigmoid(b * 2 log 2) = -4 log(2/3)
    ("DPO", [QUARTER, HALF, HALF, QUARTER], {"beta": 0.5}, [4 * math.log(3 / 2)]),
    # reference (1/2, 1/4, 1/4), the first divided by e ** log 2: (1/4, 1/4, 1/4) / (3/4), so
    # uniform; policy (1/2, 1/4, 1/4): -(log(1/2) + 2 log(1/4)) / 3 = 5/3 log 2
    ("UNDIAL", [HALF_QUARTER_QUARTER, HALF_QUARTER_QUARTER], {"beta": LOG2}, [5 / 3 * LOG2]),
    # (1/2, 1/4, 1/4) without the first is (0, 1/2, 1/2): -log(1/4) = 2 log 2
    ("CEU", [HALF_QUARTER_QUARTER], {}, [2 * LOG2]),
    # the row of one token has no loss, the other row's second token has the one above
    (
        "CEU",
        [said([[0.1, 0.8, 0.1]], [[0.2, 0.4, 0.4], [0.5, 0.25, 0.25]])],
        {"ignore_first_n_answer_tokens": 1},
        [2 * LOG2],
    ),
    # (1/2, 1/4, 1/4): the target is uniform, KL = 1/2 log(3/2) + 1/2 log(3/4) = 1/2 log(9/8)
    ("Unilogit", [HALF_QUARTER_QUARTER], {}, [math.log(9 / 8) / 2]),
    # p = (1/2, 1/2), target (0, 1), middle (1/4, 3/4):
    # 1/2 [1/2 log 2 + 1/2 log(2/3)] + 1/2 log(4/3) = 1/4 log(4/3) + 1/2 log(4/3)
    (
        "JensUn",
        [HALF, said([[0.5, 0.5], [0.5, 0.5]], labels=[[1, 0]])],
        {},
        [0.75 * math.log(4 / 3)],
    ),
    # a refusal of one token is all there is to repeat; p = (1/4, 3/4), target (0, 1), middle
    # (1/8, 7/8): 1/2 [1/4 log 2 + 3/4 log(6/7)] + 1/2 log(8/7)
    (
        "JensUn",
        [QUARTER, said([[0.5, 0.5]], labels=[[1]])],
        {},
        [(0.25 * LOG2 + 0.75 * math.log(6 / 7) + math.log(8 / 7)) / 2],
    ),
    # (1/2, 1/2) and (1/4, 3/4), middle (3/8, 5/8):
    # 1/2 [1/2 log(4/3) + 1/2 log(4/5)] + 1/2 [1/4 log(2/3) + 3/4 log(6/5)]
    (
        "JSD",
        [HALF, QUARTER],
        {},
        [math.log(16 / 15) / 4 + (math.log(2 / 3) + 3 * math.log(6 / 5)) / 8],
    ),
    # (1, 0) and (0, 1) are as far apart as can be: log 2
    ("JSD", [said([[SURE, 1e-12]]), said([[1e-12, SURE]])], {}, [LOG2]),
    # (1/2, 1/4, 1/8, 1/8), answer the third; two likeliest are believed 2/3 and 1/3:
    # 0.3 (2/3 log(1/2) + 1/3 log(1/4)) + 0.7 log(1/8) = -(0.3 * 4/3 + 0.7 * 3) log 2
    (
        "BST",
        [said([[0.5, 0.25, 0.125, 0.125]], labels=[[2]])],
        {"lambda_bst": 0.3, "top_k": 2},
        [-2.5 * LOG2],
    ),
    # without beliefs, ascent on each answer's mean: (log(1/2) + log(1/4)) / 2 and log(1/2)
    (
        "BST",
        [said([[0.5, 0.5], [0.25, 0.75]], [[0.5, 0.5]])],
        {"lambda_bst": 0.0},
        [-1.5 * LOG2, -LOG2],
    ),
    # the answer leads: 1 + 0.6 - 0.3; it follows: 1 + 0.1 - 0.6; it ties: 1
    (
        "IHL",
        [said([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.4, 0.4, 0.2]], labels=[[0, 2, 1]])],
        {},
        [1.3, 0.5, 1.0],
    ),
    # logits 3, 1, -1 have the mean 1: (3 - 1) ** 2
    ("PDU", [said([[math.exp(3), math.exp(1), math.exp(-1)]])], {}, [4.0]),
    # H(1/2, 1/4, 1/8, 1/8) = (1/2 + 2/4 + 3/8 + 3/8) log 2 = 7/4 log 2, log V = 2 log 2:
    # 2 - 7/4 at tau 1, and 1.4 - 7/4 < 0 at tau 0.7
    ("BLADE", [said([[0.5, 0.25, 0.125, 0.125]])], {"tau": 1.0}, [LOG2 / 4]),
    ("BLADE", [said([[0.5, 0.25, 0.125, 0.125]])], {"tau": 0.7}, [0.0]),
    # P of the forget answer (1/2 + 1/4) / 2 = 3/8, of the alternate 1/2
    (
        "FLAT",
        [HALF_THEN_QUARTER, HALF],
        {"divergence": "TV"},
        [math.tanh(3 / 8) / 2 - math.tanh(1 / 2) / 2],
    ),
    ("FLAT", [HALF_THEN_QUARTER, HALF], {"divergence": "KL"}, [math.exp(3 / 8 - 1) - 1 / 2]),
    # f*(g) = -log(2 - e ** g), g = log 2 - log(1 + e ** -v)
    (
        "FLAT",
        [HALF_THEN_QUARTER, HALF],
        {"divergence": "JS"},
        [-math.log(2 - 2 / (1 + math.exp(-3 / 8))) - math.log(2 / (1 + math.exp(-1 / 2)))],
    ),
    (
        "FLAT",
        [HALF_THEN_QUARTER, HALF],
        {"divergence": "Pearson"},
        [(3 / 8) ** 2 / 4 + 3 / 8 - 1 / 2],
    ),
    # the far point is 2 (0.6, 0.8) = (1.2, 1.6); the first row stands on it, in the second the
    # first token is (2, 0) away and the second (0, 1): ((4 + 0) / 2 + (0 + 1) / 2) / 2
    (
        "RMU",
        [states([[1.2, 1.6]], [[3.2, 1.6], [1.2, 0.6]])],
        {"steering_coeff": 2.0, "drawn": {"control": [0.6, 0.8]}},
        [0.0, 1.25],
    ),
    # the reference's states are 5 and 10 long, in the mean 7.5; the far point of the first row is
    # 2 * 7.5 (0.6, 0.8) = (9, 12), its tokens (1, 0) and (0, 2) away: (1/2 + 4/2) / 2.
    # The other row has its own length: 1, far point (1.2, 1.6), token (2, 2) away: 8 / 2
    (
        "AdaptiveRMU",
        [states([[10, 12], [9, 10]], [[3.2, 3.6]]), states([[3, 4], [-6, 8]], [[0, 1]])],
        {"beta": 2.0, "drawn": {"control": [0.6, 0.8]}},
        [1.25, 4.0],
    ),
    # moved by (1, 1) and (3, 1) in the first row: (2/2 + 10/2) / 2; by (2, 0) in the second: 4 / 2
    (
        "EMBED_DIFF",
        [states([[2, 1], [3, 0]], [[2, 5]]), states([[1, 0], [0, 1]], [[0, 5]])],
        {},
        [3.0, 2.0],
    ),
    # sums 2/2 + 10/2 = 6 and 4/2 = 2, lengths 2 and 1; each sum over each length:
    # (6/2 + 6/1 + 2/2 + 2/1) / 4, where the mean of the rows' means is 2.5
    (
        "EMBED_DIFF_upstream",
        [states([[2, 1], [3, 0]], [[2, 5]]), states([[1, 0], [0, 1]], [[0, 5]])],
        {},
        3.0,
    ),
    # sums (0 + 0) / 2 = 0 and 4/2 + 1/2 = 2.5, lengths 1 and 2: (0/1 + 0/2 + 2.5/1 + 2.5/2) / 4
    (
        "RMU_upstream",
        [states([[1.2, 1.6]], [[3.2, 1.6], [1.2, 0.6]])],
        {"steering_coeff": 2.0, "drawn": {"control": [0.6, 0.8]}},
        0.9375,
    ),
    # policy (1/2, 1/2) and reference (1/4, 3/4) at the first position, alike at the other three,
    # one of them the last: the KL of above divided by 4, wherever the answer is
    (
        "KL_upstream",
        [
            padded([[[0, 0], [1, 2]], [[3, 0], [0, 0]]], [[NONE, 1], [NONE, NONE]]),
            padded([[[0, LOG3], [1, 2]], [[3, 0], [0, 0]]], [[NONE, 1], [NONE, NONE]]),
        ],
        {},
        (0.75 * LOG3 - LOG2) / 4,
    ),
    # 101 tokens; the policy is uniform but for token 1, which has e ** log 100 / 200 = 1/2, the
    # others 1/200. The uniform reference loses half of token 5 where 5 is to be predicted, and of
    # token 101 - 100 = 1 where nothing is: targets (1 or 1/2) / 100.5. Cross-entropies
    # (1 log 2 + 99.5 log 200) / 100.5 and (1/2 log 2 + 100 log 200) / 100.5. Two positions: the
    # last one predicts nothing
    (
        "UNDIAL_upstream",
        [
            padded([[[0, math.log(100)]] * 3], [[NONE, 5, NONE]], vocabulary=101),
            padded([[[0, 0]] * 3], [[NONE, 5, NONE]], vocabulary=101),
        ],
        {"beta": LOG2},
        (1.5 * LOG2 + 199.5 * math.log(200)) / 100.5 / 2,
    ),
    # margins where the label stands, and not before it: (3 - 1) ** 2 and (1 - 0) ** 2 in the first
    # row, (2 - 1) ** 2 in the second; a mean over all three tokens. The 9s are not looked at
    (
        "PDU_upstream",
        [
            padded(
                [[[9, 0, 0], [3, 1, -1], [1, 0, -1]], [[9, 0, 0], [2, 1, 0], [0, 9, 0]]],
                [[NONE, 0, 1], [NONE, 2, NONE]],
            )
        ],
        {},
        2.0,
    ),
]


@pytest.mark.parametrize(
    "name, views, settings, result", BY_HAND, ids=[case[0] for case in BY_HAND]
)
def test_the_value_is_the_one_worked_out_by_hand(name, views, settings, result):
    assert value(name, *views, **settings) == pytest.approx(result, rel=1e-9, abs=1e-9)


def test_every_objective_has_a_value_by_hand():
    assert {case[0] for case in BY_HAND} == set(TERMS)


# --- against the papers' formulas in plain loops -------------------------------------------------


def test_every_objective_has_a_formula_and_every_setting_another_value():
    assert set(PAPERS) == set(TERMS), "write what the paper says into papers.py"
    for name in TERMS:
        varied = {key for settings in OTHER_SETTINGS.get(name, []) for key in settings}
        fixed = {"layer", "scale", "num_rows"}
        assert varied == set(TERMS[name].hyper) - fixed, f"{name}: see OTHER_SETTINGS"


def gradients(losses: Tensor, views: dict[str, View]) -> dict[str, Tensor]:
    """The gradient of every view of the policy."""
    # different weights, so that tokens that change places are seen
    weights = torch.arange(1.0, losses.numel() + 1, dtype=torch.float64)
    (losses.flatten() * weights).sum().backward()
    return {view: numbers(x).grad for view, x in views.items() if view.startswith("policy")}


CASES = [(name, settings) for name in TERMS for settings in [{}, *OTHER_SETTINGS.get(name, [])]]


@pytest.mark.parametrize("name, settings", CASES, ids=[f"{n}-{s}" for n, s in CASES])
def test_value_and_gradient_are_the_papers(name, settings):
    term = TERMS[name].configure(**settings)
    drawn = random_draws(term)
    views, again = random_views(term), random_views(term)
    losses = term(views, drawn)
    papers_losses = expected(term, [plain(view) for view in again.values()], drawn)
    torch.testing.assert_close(losses, papers_losses, rtol=1e-10, atol=1e-12)
    ours, papers = gradients(losses, views), gradients(papers_losses, again)
    for view, gradient in papers.items():
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(ours[view], gradient, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_every_setting_shows(name):
    term, drawn = TERMS[name], random_draws(TERMS[name])
    usual = term(random_views(term), drawn)
    for settings in OTHER_SETTINGS[name]:
        for key, changed in settings.items():
            losses = term.configure(**{key: changed})(random_views(term), drawn)
            same = losses.shape == usual.shape and torch.allclose(losses, usual, rtol=1e-6)
            assert not same, key


# --- numbers far from 1 --------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [40.0, 1e4])
@pytest.mark.parametrize("name", list(TERMS))
def test_confident_tokens_stay_finite_in_float32(name, gap):
    """The same for states that are far away."""
    term = TERMS[name]
    given: list[View] = []
    leaves = []
    for name_of_view, view in random_views(term).items():
        policy = name_of_view.startswith("policy")
        if isinstance(view, Padded):
            sure = torch.full(view.logits.shape, -gap)
            sure[..., 2 if policy else 3] = gap  # they are sure of different tokens
            given.append(Padded(sure.requires_grad_(policy), view.labels))
        else:
            tokens = random_views(TERMS["GradAscent"])["policy_forget"]
            sure = torch.full((len(tokens.labels), VOCABULARY), -gap)
            sure[:, 2] = gap  # the answer in some places, another token in most
            labels = tokens.labels
            if name_of_view.endswith("alternate"):
                labels = torch.full_like(labels, 2)
            outputs = Outputs(labels, tokens.row, tokens.rows, sure.requires_grad_(policy))
            given.append(narrowed(outputs, term.views[name_of_view]))
        leaves.append(sure)
    drawn = {key: draw(VOCABULARY, 0) for key, draw in term.draws.items()}
    losses = term(narrowed_for(term, *given), drawn)
    assert losses.dtype == torch.float32 and losses.isfinite().all()
    losses.sum().backward()
    for leaf in leaves:
        assert leaf.grad is None or leaf.grad.isfinite().all()


def test_bounded_terms_stay_within_their_bounds():
    views = random_views(TERMS["JensUn"])
    for scale in (0.0, 1.0, 100.0):
        policy = views["policy_forget"]
        policy = Outputs(policy.labels, policy.row, policy.rows, policy.logits.detach() * scale)
        opposite = Outputs(policy.labels, policy.row, policy.rows, -policy.logits)
        refused = TERMS["JensUn"](views | {"policy_forget": policy})
        apart = TERMS["JSD"]({"policy_retain": policy, "reference_retain": opposite})
        hinge = TERMS["IHL"]({"policy_forget": policy})
        unsure = TERMS["BLADE"]({"policy_forget": policy})
        assert (refused >= -1e-9).all() and (refused <= LOG2 + 1e-9).all()
        assert (apart >= -1e-9).all() and (apart <= LOG2 + 1e-9).all()
        assert (hinge >= 0).all() and (hinge <= 2).all()
        assert (unsure >= 0).all() and (unsure <= 0.7 * math.log(VOCABULARY)).all()


# --- what a formula does not show at first sight -------------------------------------------------


def test_npo_with_small_beta_has_the_gradient_of_gradient_ascent():
    term = TERMS["NPO"].configure(beta=1e-6)
    views = random_views(term)
    policy = views["policy_forget"]
    before = narrowed(
        Outputs(policy.labels, policy.row, policy.rows, policy.logits.detach()),
        term.views["reference_forget"],
    )
    by_npo = gradients(term(views | {"reference_forget": before}), {"policy_forget": policy})
    again = random_views(TERMS["GradAscent"])
    ascent = TERMS["GradAscent"](again)
    row = again["policy_forget"].row
    (ascent * (row + 1)).sum().backward()  # the weights that ``gradients`` gives the rows
    torch.testing.assert_close(
        by_npo["policy_forget"], numbers(again["policy_forget"]).grad, rtol=1e-4, atol=1e-6
    )


def test_ihl_moves_the_other_token_up_where_both_tie():
    for label in (0, 1):
        policy = said([[0.4, 0.4, 0.2]], labels=[[label]])
        policy.logits.requires_grad_()
        TERMS["IHL"]({"policy_forget": policy}).sum().backward()
        assert policy.logits.grad[0, label] > 0 > policy.logits.grad[0, 1 - label]


def test_pdu_upstream_lowers_one_of_equal_logits():
    policy = padded([[[0, 0, 0], [3, 3, 0]]], [[NONE, 0]])  # margin 3 - 2 = 1
    policy.logits.requires_grad_()
    TERMS["PDU_upstream"]({"policy_forget": policy}).backward()
    # 2 * margin * (1 - 1/3) for one, 2 * margin * (-1/3) for the others
    slopes = sorted(policy.logits.grad[0, 1].tolist())
    assert slopes == pytest.approx([-2 / 3, -2 / 3, 4 / 3])


def test_blade_leaves_tokens_alone_that_are_unsure_enough():
    policy = said([[0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]])
    policy.logits.requires_grad_()
    TERMS["BLADE"]({"policy_forget": policy}).sum().backward()
    moved = policy.logits.grad.abs().sum(-1)
    assert moved[0] > 0 and moved[1] == 0


def test_unilogit_rests_where_the_answer_is_as_likely_as_chance():
    for likely, rests in ((0.25, True), (0.2, False)):
        policy = said([[likely, 0.05, 0.6, 0.35 - likely]])
        policy.logits.requires_grad_()
        TERMS["Unilogit"]({"policy_forget": policy}).sum().backward()
        assert (policy.logits.grad.abs().max() < 1e-9) == rests


def test_flat_names_the_divergences_it_knows():
    with pytest.raises(InputError, match="'tv'. Did you mean 'TV'.*JS, KL, Pearson, TV"):
        value("FLAT", HALF, HALF, divergence="tv")
