"""Each objective's formula, from its paper, in plain loops; nothing here is the code under test.

A formula gets plain lists, in the order of the term's views, and its settings by name:

    of Outputs         per row, per scored token: its logits z and the token y
    of Hidden          per row, per scored token: its state h
    of SequenceLogps   per row: log p of the whole answer
    of ScoredTokens    per row: its tokens
    of Padded          per row, per position: its logits z and the label at that position

It returns a list with one loss for each token or row, or one number for all. What the references
say is a constant because nothing that is passed for them has a gradient; constants that are made
from the policy are detached here.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from unlora.forward import IGNORE_INDEX
from unlora.objectives import Term

Formula = Callable[..., Any]
PAPERS: dict[str, Formula] = {}
NOT_IN_THE_LOSS = ("layer", "scale", "num_rows")  # they say what is asked, or what comes afterwards
# beside the defaults, settings at which each of them shows
OTHER_SETTINGS: Mapping[str, list[dict[str, object]]] = {
    "AdaptiveRMU": [{"beta": 3.0}],
    "BLADE": [{"tau": 0.9}],
    "BST": [{"lambda_bst": 0.4, "top_k": 3}],
    "CEU": [{"ignore_first_n_answer_tokens": 1}],
    "DPO": [{"beta": 0.5}],
    "FLAT": [{"divergence": "KL"}, {"divergence": "JS"}, {"divergence": "Pearson"}],
    "NPO": [{"beta": 0.5}],
    "RMU": [{"steering_coeff": 6.5}],
    "RMU_upstream": [{"steering_coeff": 6.5}],
    "SatImp": [{"beta1": 0.5, "beta2": 2.0}],
    "SimNPO": [{"beta": 1.5, "delta": 0.25}],
    "UNDIAL": [{"beta": 3.0}],
    "UNDIAL_upstream": [{"beta": 3.0}],
    "WGA": [{"beta": 0.5}],
}


def expected(term: Term, lists: list[list], drawn: Mapping[str, Tensor]) -> Tensor:
    """The paper's losses for a configured term."""
    settings = {key: x for key, x in term.hyper.items() if key not in NOT_IN_THE_LOSS}
    found = PAPERS[term.name](*lists, **settings, **drawn)
    if isinstance(found, Tensor):
        return found
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)


def paper(*names: str) -> Callable[[Formula], Formula]:
    """This formula is that of the terms with these names."""

    def register(formula: Formula) -> Formula:
        PAPERS.update(dict.fromkeys(names, formula))
        return formula

    return register


def per_token(formula: Formula) -> Formula:
    """The loss of one token, over all tokens of all rows; other views go along."""

    def over(*views: list, **settings: object) -> list:
        losses = []
        for rows in zip(*views, strict=True):
            for tokens in zip(*rows, strict=True):
                losses.append(formula(*(x for token in tokens for x in token), **settings))
        return losses

    return over


# --- what the formulas are written in ------------------------------------------------------------


def softmax(z: Tensor) -> Tensor:
    return z.exp() / z.exp().sum()


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def entropy(p: Tensor) -> Tensor:
    return -(p * p.log()).sum()


def cross_entropy(target: Tensor, p: Tensor) -> Tensor:
    return -(target * p.log()).sum()


def kl(p: Tensor, q: Tensor) -> Tensor:
    """sum p log(p / q), with 0 log 0 = 0."""
    some = p > 0
    return (p[some] * (p[some] / q[some]).log()).sum()


def js(p: Tensor, q: Tensor) -> Tensor:
    return kl(p, (p + q) / 2) / 2 + kl(q, (p + q) / 2) / 2


def certain(y: int, like: Tensor) -> Tensor:
    """The distribution in which token y has probability 1."""
    one = torch.zeros_like(like)
    one[y] = 1
    return one


def logp(row: list) -> Tensor:
    """log p(answer | prompt) = sum_t log p_t."""
    return sum(softmax(z)[y].log() for z, y in row)


def squared_distance(h: Tensor, point: Tensor) -> Tensor:
    """|| h - point || ** 2, as a mean over the coordinates."""
    return sum((h[d] - point[d]) ** 2 for d in range(len(h))) / len(h)


# --- likelihood ----------------------------------------------------------------------------------


@paper("GradAscent", "GradDiff")
@per_token
def ascent(z, y):
    return softmax(z)[y].log()


@paper("NLL", "IdkNLL", "Negation", "PerTA")
@per_token
def nll(z, y):
    return -softmax(z)[y].log()


@paper("KL")
@per_token
def kl_to_the_reference(z, y, z0, y0):
    assert y == y0
    return kl(softmax(z0), softmax(z))


@paper("WGA")
@per_token
def wga(z, y, *, beta):
    p = softmax(z)[y]
    return p.detach() ** beta * p.log()


@paper("SatImp")
@per_token
def satimp(z, y, *, beta1, beta2):
    p = softmax(z)[y]
    return p.detach() ** beta1 * (1 - p.detach()) ** beta2 * p.log()


# --- preference ----------------------------------------------------------------------------------


@paper("NPO")
def npo(policy, reference, *, beta):
    losses = []
    for row, logp_before in zip(policy, reference, strict=True):
        ratio = (logp(row) - logp_before).exp()
        losses.append(-2 / beta * sigmoid(-beta * ratio.log()).log())
    return losses


@paper("SimNPO")
def simnpo(policy, *, beta, delta):
    gamma = beta * delta  # the paper's
    return [-2 / beta * sigmoid(-beta / len(row) * logp(row) - gamma).log() for row in policy]


@paper("DPO")
def dpo(policy_lost, reference_lost, policy_won, reference_won, *, beta):
    losses = []
    for lost, lost0, won, won0 in zip(
        policy_lost, reference_lost, policy_won, reference_won, strict=True
    ):
        margin = beta * (logp(won) - won0) - beta * (logp(lost) - lost0)
        losses.append(-2 / beta * sigmoid(margin).log())
    return losses


# --- distillation --------------------------------------------------------------------------------


@paper("UNDIAL")
@per_token
def undial(z, y, z0, y0, *, beta):
    target = softmax(z0 - beta * certain(y, z0))
    return cross_entropy(target, softmax(z))


@paper("CEU")
def ceu(policy, *, ignore_first_n_answer_tokens):
    losses = []
    for row in policy:
        for z, y in row[ignore_first_n_answer_tokens:]:
            others = [v for v in range(len(z)) if v != y]
            target = softmax(z[others]).detach()
            losses.append(cross_entropy(target, softmax(z)[others]))
    return losses


@paper("Unilogit")
@per_token
def unilogit(z, y):
    size = len(z)
    target = z.detach().clone()
    others = [v for v in range(size) if v != y]
    target[y] = target[others].exp().sum().log() - math.log(size - 1)
    assert abs(float(softmax(target)[y]) - 1 / size) < 1e-12
    return kl(softmax(z), softmax(target))


@paper("JensUn")
def jensun(policy, refusals):
    losses = []
    for row, refusal in zip(policy, refusals, strict=True):
        words = refusal[:-1] or refusal  # the last token ends the refusal
        for t, (z, _) in enumerate(row):
            losses.append(js(softmax(z), certain(words[t % len(words)], z.detach())))
    return losses


@paper("JSD")
@per_token
def jsd(z, y, z0, y0):
    return js(softmax(z), softmax(z0))


@paper("BST")
def bst(policy, *, lambda_bst, top_k):
    losses = []
    for row in policy:
        total = 0
        for z, y in row:
            best = z.detach().argsort(descending=True)[:top_k]
            target = (1 - lambda_bst) * certain(y, z.detach())
            target[best] += lambda_bst * softmax(z.detach()[best])
            total = total - cross_entropy(target, softmax(z))
        losses.append(total / len(row))
    return losses


# --- margins -------------------------------------------------------------------------------------


@paper("IHL")
@per_token
def ihl(z, y):
    p = softmax(z)
    return 1 + p[y] - max(p[v] for v in range(len(p)) if v != y)


@paper("PDU")
@per_token
def margin(z, y):
    return (max(z) - sum(z) / len(z)) ** 2


@paper("BLADE")
@per_token
def clamped_entropy(z, y, *, tau):
    room = tau * math.log(len(z)) - entropy(softmax(z))
    return room if room > 0 else 0 * room


@paper("FLAT")
def flat(forget, alternate, *, divergence):
    def probability(row):
        return sum(softmax(z)[y] for z, y in row) / len(row)

    g = {
        "TV": lambda v: v.tanh() / 2,
        "KL": lambda v: v,
        "JS": lambda v: math.log(2) - (1 + (-v).exp()).log(),
        "Pearson": lambda v: v,
    }[divergence]
    conjugate = {
        "TV": lambda u: u,
        "KL": lambda u: (u - 1).exp(),
        "JS": lambda u: -(2 - u.exp()).log(),
        "Pearson": lambda u: u**2 / 4 + u,
    }[divergence]
    pairs = zip(forget, alternate, strict=True)
    return [-g(probability(won)) + conjugate(g(probability(lost))) for lost, won in pairs]


# --- hidden states -------------------------------------------------------------------------------


@paper("RMU")
def rmu(policy, *, control, steering_coeff):
    point = steering_coeff * control
    return [sum(squared_distance(h, point) for h in row) / len(row) for row in policy]


@paper("AdaptiveRMU")
def adaptive_rmu(policy, reference, *, control, beta):
    losses = []
    for row, before in zip(policy, reference, strict=True):
        length = sum((h0**2).sum().sqrt() for h0 in before) / len(before)
        total = sum(squared_distance(h, beta * length * control) for h in row)
        losses.append(total / len(row))
    return losses


@paper("EMBED_DIFF")
def embed_diff(policy, reference):
    losses = []
    for row, before in zip(policy, reference, strict=True):
        pairs = zip(row, before, strict=True)
        losses.append(sum(squared_distance(h, h0) for h, h0 in pairs) / len(row))
    return losses


# --- what Open-Unlearning computes ---------------------------------------------------------------


@paper("UNDIAL_upstream")
def undial_upstream(policy, reference, *, beta):
    """All positions but the last; where the label is -100, that is an index from the end."""
    losses = []
    for row, before in zip(policy, reference, strict=True):
        for t in range(len(row) - 1):
            (z, _), (z0, _), (_, label) = row[t], before[t], row[t + 1]
            lowered = z0.clone()
            lowered[label] -= beta
            losses.append(cross_entropy(softmax(lowered), softmax(z)))
    return sum(losses) / len(losses)


@paper("KL_upstream")
def kl_upstream(policy, reference):
    """All positions, the last included."""
    losses = [
        kl(softmax(z0), softmax(z))
        for row, before in zip(policy, reference, strict=True)
        for (z, _), (z0, _) in zip(row, before, strict=True)
    ]
    return sum(losses) / len(losses)


@paper("RMU_upstream")
def rmu_upstream(policy, *, control, steering_coeff):
    point = steering_coeff * control
    return mean_of_all_pairs([[squared_distance(h, point) for h in row] for row in policy])


@paper("EMBED_DIFF_upstream")
def embed_diff_upstream(policy, reference):
    return mean_of_all_pairs(
        [
            [squared_distance(h, h0) for h, h0 in zip(row, before, strict=True)]
            for row, before in zip(policy, reference, strict=True)
        ]
    )


def mean_of_all_pairs(distances: list[list[Tensor]]) -> Tensor:
    """Sums [b] over lengths [b, 1] are [b, b]: the sum of each row over the length of each row."""
    quotients = [sum(one) / len(other) for one in distances for other in distances]
    return sum(quotients) / len(quotients)


@paper("PDU_upstream")
def pdu_upstream(policy):
    """The label of a position, not of the next one, says whether it counts.

    The data that it is used on never label the first position of a row.
    """
    losses = [margin([[(z, y)]])[0] for row in policy for z, y in row[1:] if y != IGNORE_INDEX]
    return sum(losses) / len(losses)
