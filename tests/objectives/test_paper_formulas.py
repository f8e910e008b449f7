"""Every objective against its paper's formula, by hand and in plain loops."""

import math

import pytest
import torch
from torch import Tensor

from unlora.errors import InputError
from unlora.objectives import TERMS
from unlora.outputs import IGNORE_INDEX, Outputs

VOCABULARY = 7


def said(*rows: list[list[float]], labels: list[list[int]] | None = None) -> Outputs:
    """Outputs with these token distributions, all labels 0 if not given."""
    probabilities = torch.tensor([token for row in rows for token in row], dtype=torch.float64)
    row = torch.tensor([i for i, row in enumerate(rows) for _ in row])
    given = labels or [[0] * len(row) for row in rows]
    return Outputs(
        probabilities.log(), torch.tensor([x for one in given for x in one]), row, len(rows)
    )


def value(name: str, *outputs: Outputs, **hyper: object) -> list[float]:
    term = TERMS[name].configure(**hyper)
    return term(dict(zip(term.views, outputs, strict=True))).tolist()


# --- by hand -------------------------------------------------------------------------------------


def test_wga_by_hand():
    # p = 1/4: p ** 2 log p = -log(4) / 16
    assert value("WGA", said([[0.25, 0.75]]), beta=2.0) == pytest.approx([-math.log(4) / 16])


def test_satimp_by_hand():
    # p = 1/2: (1/2) ** 5 * (1/2) ** 1 * log(1/2) = -log(2) / 64
    assert value("SatImp", said([[0.5, 0.5]])) == pytest.approx([-math.log(2) / 64])


def test_undial_by_hand():
    # reference (1/2, 1/4, 1/4), the first divided by e ** log 2: (1/4, 1/4, 1/4) / (3/4), so
    # uniform; policy (1/2, 1/4, 1/4): -(log(1/2) + 2 log(1/4)) / 3 = 5/3 log 2
    both = said([[0.5, 0.25, 0.25]])
    assert value("UNDIAL", both, both, beta=math.log(2)) == pytest.approx([5 / 3 * math.log(2)])


def test_ceu_by_hand():
    # (1/2, 1/4, 1/4) without the first is (0, 1/2, 1/2): -log(1/4) = 2 log 2
    assert value("CEU", said([[0.5, 0.25, 0.25]])) == pytest.approx([2 * math.log(2)])


def test_unilogit_by_hand():
    # (1/2, 1/4, 1/4): the target is uniform, KL = 1/2 log(3/2) + 1/2 log(3/4) = 1/2 log(9/8)
    assert value("Unilogit", said([[0.5, 0.25, 0.25]])) == pytest.approx([math.log(9 / 8) / 2])


def test_jensun_by_hand():
    # p = (1/2, 1/2), target (0, 1), middle (1/4, 3/4):
    # 1/2 [1/2 log 2 + 1/2 log(2/3)] + 1/2 log(4/3) = 1/4 log(4/3) + 1/2 log(4/3)
    target = said([[1.0, 0.0], [1.0, 0.0]], labels=[[1, 0]])
    assert value("JensUn", said([[0.5, 0.5]]), target) == pytest.approx([0.75 * math.log(4 / 3)])


def test_jsd_by_hand():
    # (1, 0) and (0, 1) are as far apart as can be: log 2
    far = value("JSD", said([[1 - 1e-12, 1e-12]]), said([[1e-12, 1 - 1e-12]]))
    assert far == pytest.approx([math.log(2)])


def test_bst_by_hand():
    # (1/2, 1/4, 1/8, 1/8), answer the third; two likeliest are believed 2/3 and 1/3:
    # 0.3 (2/3 log(1/2) + 1/3 log(1/4)) + 0.7 log(1/8) = -(0.3 * 4/3 + 0.7 * 3) log 2
    policy = said([[0.5, 0.25, 0.125, 0.125]], labels=[[2]])
    got = value("BST", policy, lambda_bst=0.3, top_k=2)
    assert got == pytest.approx([-2.5 * math.log(2)])


def test_bst_without_beliefs_is_ascent_on_each_answers_mean():
    policy = said([[0.5, 0.5], [0.25, 0.75]], [[0.5, 0.5]])
    # (log(1/2) + log(1/4)) / 2 and log(1/2)
    expected = [-1.5 * math.log(2), -math.log(2)]
    assert value("BST", policy, lambda_bst=0.0) == pytest.approx(expected)


def test_ihl_by_hand():
    # the answer leads: 1 + 0.6 - 0.3; it follows: 1 + 0.1 - 0.6; it ties: 1
    policy = said([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.4, 0.4, 0.2]], labels=[[0, 2, 1]])
    assert value("IHL", policy) == pytest.approx([1.3, 0.5, 1.0])


def test_ihl_moves_the_other_token_up_where_both_tie():
    for label in (0, 1):
        policy = said([[0.4, 0.4, 0.2]], labels=[[label]])
        policy.logits.requires_grad_()
        TERMS["IHL"]({"policy_forget": policy}).sum().backward()
        assert policy.logits.grad[0, label] > 0 > policy.logits.grad[0, 1 - label]


def test_logit_margin_by_hand():
    # logits 3, 1, -1: mean 1, so (3 - 1) ** 2
    logits = torch.tensor([[3.0, 1.0, -1.0]])
    zero = torch.zeros(1, dtype=torch.int64)
    assert value("LogitMargin", Outputs(logits, zero, zero, 1)) == [4.0]


def test_idk_nll_by_hand():
    assert value("IdkNLL", said([[0.5, 0.5], [0.25, 0.75]])) == pytest.approx(
        [math.log(2), math.log(4)]
    )


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        # P of the forget answer (1/2 + 1/4) / 2 = 3/8, of the alternate 1/2
        ("TV", math.tanh(3 / 8) / 2 - math.tanh(1 / 2) / 2),
        ("KL", math.exp(3 / 8 - 1) - 1 / 2),
        # f*(g) = -log(2 - e ** g), g = log 2 - log(1 + e ** -v)
        (
            "JS",
            -math.log(2 - 2 / (1 + math.exp(-3 / 8))) - math.log(2 / (1 + math.exp(-1 / 2))),
        ),
        ("Pearson", (3 / 8) ** 2 / 4 + 3 / 8 - 1 / 2),
    ],
)
def test_flat_by_hand(divergence, expected):
    forget, alternate = said([[0.5, 0.5], [0.25, 0.75]]), said([[0.5, 0.5]])
    assert value("FLAT", forget, alternate, divergence=divergence) == pytest.approx([expected])


def test_flat_names_the_divergences_it_knows():
    both = said([[0.5, 0.5]])
    with pytest.raises(InputError, match="'tv'. Did you mean 'TV'.*JS, KL, Pearson, TV"):
        value("FLAT", both, both, divergence="tv")


# --- against the papers' formulas in plain loops -------------------------------------------------


def random_outputs(seed: int, lengths: tuple[int, ...]) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    return Outputs(
        2 * torch.randn(tokens, VOCABULARY, generator=generator, dtype=torch.float64),
        torch.randint(VOCABULARY, (tokens,), generator=generator),
        torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        len(lengths),
    )


def by_row(outputs: Outputs) -> list[list[tuple[Tensor, int]]]:
    """For each row, for each token: its logits and its label."""
    rows: list[list[tuple[Tensor, int]]] = [[] for _ in range(outputs.rows)]
    for logits, label, row in zip(outputs.logits, outputs.labels, outputs.row, strict=True):
        rows[int(row)].append((logits, int(label)))
    return rows


def softmax(logits: Tensor) -> Tensor:
    return logits.exp() / logits.exp().sum()


def kl(p: Tensor, q: Tensor) -> Tensor:
    return sum(p[v] * (p[v] / q[v]).log() for v in range(len(p)) if p[v] > 0)


def js(p: Tensor, q: Tensor) -> Tensor:
    return kl(p, (p + q) / 2) / 2 + kl(q, (p + q) / 2) / 2


def each_token(loss):
    """A formula of one token's logits and label, over all tokens."""
    return lambda policy: [loss(z, y) for row in by_row(policy) for z, y in row]


def undial(policy, reference):
    losses = []
    for said_now, said_before in zip(by_row(policy), by_row(reference), strict=True):
        for (z, y), (z0, _) in zip(said_now, said_before, strict=True):
            target = softmax(z0 - 10 * torch.eye(VOCABULARY)[y]).detach()
            losses.append(-sum(target[v] * softmax(z)[v].log() for v in range(VOCABULARY)))
    return losses


def ceu(policy):
    losses = []
    for row in by_row(policy):
        for z, y in row[1:]:
            rest = [v for v in range(VOCABULARY) if v != y]
            target = softmax(z[rest]).detach()
            losses.append(-sum(target[i] * softmax(z)[v].log() for i, v in enumerate(rest)))
    return losses


def unilogit(z, y):
    target = z.detach().clone()
    rest = [v for v in range(VOCABULARY) if v != y]
    target[y] = (target[rest].exp().sum() / (VOCABULARY - 1)).log()
    assert float(softmax(target)[y]) == pytest.approx(1 / VOCABULARY)
    return kl(softmax(z), softmax(target))


def jensun(policy, alternate):
    losses = []
    for row, refusal in zip(by_row(policy), by_row(alternate), strict=True):
        words = [y for _, y in refusal]
        pattern = words[:-1] or words
        for t, (z, _) in enumerate(row):
            certain = torch.eye(VOCABULARY, dtype=torch.float64)[pattern[t % len(pattern)]]
            losses.append(js(softmax(z), certain))
    return losses


def jsd(policy, reference):
    pairs = zip(policy.logits, reference.logits, strict=True)
    return [js(softmax(z), softmax(z0).detach()) for z, z0 in pairs]


def bst(policy):
    losses = []
    for row in by_row(policy):
        total = 0
        for z, y in row:
            best = z.detach().argsort(descending=True)[:3].tolist()
            belief = softmax(z[best]).detach()
            soft = 0.8 * torch.eye(VOCABULARY, dtype=torch.float64)[y]
            for i, v in enumerate(best):
                soft[v] += 0.2 * belief[i]
            total = total + (soft * softmax(z).log()).sum()
        losses.append(total / len(row))
    return losses


def ihl(z, y):
    p = softmax(z)
    return 1 + p[y] - max(p[v] for v in range(VOCABULARY) if v != y)


def mean_probability(row):
    return sum(softmax(z)[y] for z, y in row) / len(row)


def flat_js(policy, alternate):
    losses = []
    for row, other in zip(by_row(policy), by_row(alternate), strict=True):
        g = [math.log(2) - (1 + (-mean_probability(x)).exp()).log() for x in (row, other)]
        losses.append(-(2 - g[0].exp()).log() - g[1])
    return losses


LONG, SHORT = (3, 5, 1), (2, 1, 4)
CASES = {
    "WGA": each_token(lambda z, y: softmax(z)[y].detach() ** 0.5 * softmax(z)[y].log()),
    "SatImp": each_token(
        lambda z, y: (
            softmax(z)[y].detach() ** 5 * (1 - softmax(z)[y].detach()) * softmax(z)[y].log()
        )
    ),
    "UNDIAL": undial,
    "CEU": ceu,
    "Unilogit": each_token(unilogit),
    "JensUn": jensun,
    "JSD": jsd,
    "BST": bst,
    "IHL": each_token(ihl),
    "LogitMargin": each_token(lambda z, y: (max(z) - sum(z) / VOCABULARY) ** 2),
    "IdkNLL": each_token(lambda z, y: -softmax(z)[y].log()),
    "FLAT": flat_js,
}
HYPER = {
    "WGA": {"beta": 0.5},
    "CEU": {"ignore_first_n_answer_tokens": 1},
    "BST": {"top_k": 3},
    "FLAT": {"divergence": "JS"},
}


def views_of(name: str) -> dict[str, Outputs]:
    """Random outputs; alternate answers are of other lengths than the answers."""
    views = {}
    for seed, view in enumerate(TERMS[name].views):
        views[view] = random_outputs(seed, SHORT if view.endswith("alternate") else LONG)
        views[view].logits.requires_grad_()
    return views


def gradients(losses: Tensor, views: dict[str, Outputs]) -> dict[str, Tensor | None]:
    # different weights, so that tokens that change places are seen
    weights = torch.arange(1.0, len(losses) + 1, dtype=torch.float64)
    (losses * weights).sum().backward()
    return {view: outputs.logits.grad for view, outputs in views.items()}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_the_papers(name):
    views, again = views_of(name), views_of(name)
    losses = TERMS[name].configure(**HYPER.get(name, {}))(views)
    expected = torch.stack(CASES[name](*again.values()))
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-12)
    ours, papers = gradients(losses, views), gradients(expected, again)
    for view in views:
        if view.startswith("reference"):
            assert ours[view] is None, "a reference is a constant"
        else:
            assert papers[view].abs().max() > 1e-3
            torch.testing.assert_close(ours[view], papers[view], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_confident_tokens_stay_finite_in_float32(name):
    for gap in (40.0, 1e4):
        views = {}
        for view, outputs in views_of(name).items():
            sure = torch.full((len(outputs.labels), VOCABULARY), -gap)
            sure[:, 2] = gap  # the answer in some places, another token in most
            views[view] = Outputs(
                sure.requires_grad_(view.startswith("policy")),
                outputs.labels.clone().fill_(2) if view.endswith("alternate") else outputs.labels,
                outputs.row,
                outputs.rows,
            )
        losses = TERMS[name].configure(**HYPER.get(name, {}))(views)
        assert losses.dtype == torch.float32 and losses.isfinite().all()
        losses.sum().backward()
        for outputs in views.values():
            assert outputs.logits.grad is None or outputs.logits.grad.isfinite().all()


def test_ceu_counts_the_losses_it_returns():
    term = TERMS["CEU"].configure(ignore_first_n_answer_tokens=1)
    labels = torch.full((3, 8), IGNORE_INDEX)
    for row, length in enumerate(LONG):
        labels[row, 1 : 1 + length] = 1
    assert term.count(labels) == len(term(views_of("CEU"))) == sum(LONG) - 3


def test_bounded_terms_stay_within_their_bounds():
    views = views_of("JensUn")
    for scale in (0.0, 1.0, 100.0):
        policy = views["policy_forget"]
        policy = Outputs(policy.logits.detach() * scale, policy.labels, policy.row, policy.rows)
        opposite = Outputs(-policy.logits, policy.labels, policy.row, policy.rows)
        refused = TERMS["JensUn"](views | {"policy_forget": policy})
        apart = TERMS["JSD"]({"policy_retain": policy, "reference_retain": opposite})
        hinge = TERMS["IHL"]({"policy_forget": policy})
        assert (refused >= -1e-9).all() and (refused <= math.log(2) + 1e-9).all()
        assert (apart >= -1e-9).all() and (apart <= math.log(2) + 1e-9).all()
        assert (hinge >= 0).all() and (hinge <= 2).all()
