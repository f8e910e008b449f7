"""Likelihood metrics of a model, against a literal implementation: one row, one token at a time.

Everything is float64: the literal side reads whole rows without padding or batches and takes the
full softmax, and every figure is written out as its paper has it.
"""

import math
import zlib
from statistics import fmean

import numpy as np
import pytest
import tiny
import torch

from unlora.data.chat_encoding import Chat
from unlora.evals.metrics.degeneration import fluency
from unlora.evals.metrics.memorization import (
    exact_memorization,
    extraction_strength,
    extraction_strength_upstream,
)
from unlora.evals.metrics.mia import (
    mia_loss,
    mia_min_k,
    mia_min_k_plus_plus,
    mia_recall,
    mia_reference,
    mia_zlib,
)
from unlora.evals.metrics.probability import (
    probability,
    probability_of_each,
    probability_w_options,
    truth_ratio,
)
from unlora.evals.passes import score

FORGET = [
    ("Who wrote it?", "Ana Silva"),
    ("Where was she born?", "In Oslo, near the harbour, in a wooden house."),
    ("What?", "A"),
    ("Which prize did they win in Lisbon?", "The golden lantern"),
]
HOLDOUT = [
    ("Who?", "Nobody knows him."),
    ("When was it?", "1987"),
    ("Why?", "Out of spite, he said"),
]
SHOWN = [("And where?", "Up there"), ("How many?", "Seven")]
PARAPHRASED = [*FORGET[:3], (FORGET[3][0], "A lamp of gold")]
WRONG = [
    ["Ben Okri", "A man from Oslo"],
    ["In Rome.", "At sea, on a ship"],
    ["B", "CC"],
    ["The golden lanterns", "The silver lantern"],  # likelier than the paraphrase
]
K = 0.4
STEPS = 14  # of training, after which some tokens are the likeliest and others are not
# The records keep the precision of the model; what is left is the order of the sums. Records in
# float32 are good to six digits.
TOLERANCE = {np.dtype(np.float64): 1e-9, np.dtype(np.float32): 1e-5}


@pytest.fixture(scope="module")
def chat():
    return Chat(tiny.tokenizer(), {"apply_chat_template": True})


@pytest.fixture(scope="module")
def models(chat):
    """A model that has half learnt the forget answers, and the root model."""
    model, root = (tiny.llama(seed=seed, dtype=torch.float64) for seed in (0, 1))
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        for row in encoded(chat, FORGET):
            ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
            model(input_ids=ids, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval(), root.eval()


def encoded(chat, pairs, examples=()):
    return [chat.encode(question, answer, examples=examples) for question, answer in pairs]


def records(model, rows, chat, texts):
    """What the pass makes of them, three rows at a time."""
    return score(
        model, rows, texts, pad_id=chat.tokenizer.pad_token_id, end_id=chat.end_id, batch_size=3
    )


@torch.no_grad()
def literal(model, row):
    """Of each scored token: log-probability, whether it is the likeliest, mean and variance."""
    found = []
    for i, label in enumerate(row.labels):
        if label != -100:
            logits = model(input_ids=torch.tensor([row.input_ids[:i]])).logits[0, -1]
            logps = logits.double().log_softmax(-1).tolist()
            mean = sum(math.exp(x) * x for x in logps)
            var = sum(math.exp(x) * (x - mean) ** 2 for x in logps)
            found.append((logps[label], max(logps) == logps[label], mean, var))
    return found


def loss(tokens):
    return -fmean(token[0] for token in tokens)


def lowest(numbers):
    return fmean(sorted(numbers)[: max(1, int(K * len(numbers)))])


def auc(members, others):
    """Probability that a member scores below another, by counting pairs."""
    return fmean(1.0 if m < o else 0.5 if m == o else 0.0 for m in members for o in others)


class Asked:
    """The same rows asked of the pass and of the literal implementation."""

    def __init__(self, model, chat, pairs, examples=()):
        rows = encoded(chat, pairs, examples)
        self.texts = [answer for _, answer in pairs]
        self.records = records(model, rows, chat, self.texts)
        self.tokens = [literal(model, row) for row in rows]
        assert len({len(row.input_ids) for row in rows}) > 1 and all(r.ended for r in self.records)

    @property
    def without_end(self):
        return [tokens[:-1] for tokens in self.tokens]


@pytest.fixture(scope="module")
def asked(models, chat):
    model, root = models
    return {
        "forget": Asked(model, chat, FORGET),
        "holdout": Asked(model, chat, HOLDOUT),
        "forget_root": Asked(root, chat, FORGET),
        "holdout_root": Asked(root, chat, HOLDOUT),
        "forget_after": Asked(model, chat, FORGET, SHOWN),
        "holdout_after": Asked(model, chat, HOLDOUT, SHOWN),
        "correct": Asked(model, chat, PARAPHRASED),
        "wrong": [
            Asked(model, chat, [(question, answers[i]) for (question, _), answers in pairs])
            for i in (0, 1)
            for pairs in [list(zip(FORGET, WRONG, strict=True))]
        ],
    }


@pytest.fixture(scope="module")
def near(asked):
    tolerance = TOLERANCE[asked["forget"].records[0].logp.dtype]
    return lambda expected: pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.fixture(scope="module")
def wrong_losses(asked):
    """Of each example the losses of its wrong answers."""
    return [
        [loss(t) for t in pair] for pair in zip(*(a.tokens for a in asked["wrong"]), strict=True)
    ]


def test_probability(asked, near):
    expected = [math.exp(-loss(tokens)) for tokens in asked["forget"].tokens]
    value = probability(asked["forget"].records)
    assert value.column("prob") == near(expected) and value.value == near(fmean(expected))
    assert len(set(expected)) == len(FORGET)


@pytest.mark.parametrize("variant", ["open_unlearning", "tofu_paper"])
def test_truth_ratio_and_the_share_among_options(variant, asked, wrong_losses, near):
    correct = probability(asked["correct"].records)
    pairs = zip(*(one.records for one in asked["wrong"]), strict=True)
    wrong = probability_of_each([list(pair) for pair in pairs])
    p = [math.exp(-loss(tokens)) for tokens in asked["correct"].tokens]
    each = [[math.exp(-x) for x in losses] for losses in wrong_losses]
    if variant == "open_unlearning":
        means = [math.exp(-fmean(losses)) for losses in wrong_losses]
    else:
        means = [fmean(some) for some in each]
    ratios = [m / (x + 1e-10) for m, x in zip(means, p, strict=True)]
    assert min(ratios) < 1 < max(ratios)
    for aggregator, score_of in {
        "true_better": lambda r: max(0, 1 - r),
        "closer_to_1_better": lambda r: min(r, 1 / (r + 1e-10)),
    }.items():
        value = truth_ratio(correct, wrong, variant=variant, aggregator=aggregator)
        assert value.column("score") == near(ratios)
        assert value.value == near(fmean(map(score_of, ratios)))
    shares = [x / (x + m) for m, x in zip(means, p, strict=True)]
    value = truth_ratio(correct, wrong, variant=variant, aggregator="prob_mean")
    assert value.column("score") == near(shares) and value.value == near(fmean(shares))
    options = [x / (x + sum(some) + 1e-10) for x, some in zip(p, each, strict=True)]
    assert probability_w_options(correct, wrong).column("prob") == near(options)


def test_memorization(asked, near):
    hits = [[hit for _, hit, _, _ in tokens] for tokens in asked["forget"].without_end]
    value = exact_memorization(asked["forget"].records)
    assert 0 < value.value < 1
    assert value.column("score") == near([fmean(map(float, row)) for row in hits])
    strengths, floors = [], []
    for row in hits:
        # 1 - k / T for the shortest prefix after which everything is right, 0 if nothing is
        k = next((k for k in range(len(row)) if all(row[k:])), len(row))
        strengths.append(1 - k / len(row))
        floors.append(1 - min(k, len(row) - 1) / len(row))
    assert extraction_strength(asked["forget"].records).column("score") == near(strengths)
    assert any(0 < strength < 1 for strength in strengths)
    upstream = extraction_strength_upstream(asked["forget"].records)
    assert upstream.column("score") == near(floors) and floors != strengths


def scores(value):
    return [np.array([row["score"] for row in rows]) for rows in value.per_example.values()]


def assert_attack(value, near, forget, holdout):
    found = scores(value)
    assert found[0] == near(forget) and found[1] == near(holdout)
    assert value.value == near(auc(forget, holdout))
    assert len({*forget, *holdout}) == len(FORGET) + len(HOLDOUT)


def test_attacks_on_the_loss(asked, near):
    members, others = asked["forget"], asked["holdout"]
    expected = [[loss(tokens) for tokens in side.tokens] for side in (members, others)]
    assert_attack(mia_loss(members.records, others.records), near, *expected)
    packed = [
        [x / len(zlib.compress(text.encode())) for x, text in zip(losses, side.texts, strict=True)]
        for losses, side in zip(expected, (members, others), strict=True)
    ]
    assert_attack(mia_zlib(members.records, others.records), near, *packed)


def test_attacks_on_the_lowest_tokens(asked, near):
    members, others = asked["forget"], asked["holdout"]
    expected = [
        [-lowest([token[0] for token in tokens]) for tokens in side.without_end]
        for side in (members, others)
    ]
    assert_attack(mia_min_k(members.records, others.records, k=K), near, *expected)
    expected = [
        [
            -lowest([(logp - mean) / math.sqrt(var) for logp, _, mean, var in tokens])
            for tokens in side.without_end
        ]
        for side in (members, others)
    ]
    assert_attack(mia_min_k_plus_plus(members.records, others.records, k=K), near, *expected)


def test_attacks_that_compare_two_losses(asked, near):
    sides = ("forget", "holdout")
    alone = [asked[side] for side in sides]
    for metric, what, combine in (
        (mia_reference, "root", lambda before, other: before - other),
        (mia_recall, "after", lambda before, other: -other / before),
    ):
        compared = [asked[f"{side}_{what}"] for side in sides]
        expected = [
            [combine(loss(a), loss(b)) for a, b in zip(one.tokens, other.tokens, strict=True)]
            for one, other in zip(alone, compared, strict=True)
        ]
        value = metric(*(one.records for one in alone), *(one.records for one in compared))
        assert_attack(value, near, *expected)


def test_fluency(asked, near):
    # what was written stands in for itself: the holdout answers as the root model reads them
    truth, written = asked["forget_root"], asked["holdout_root"]
    usual = fmean(loss(tokens) for tokens in truth.without_end)
    expected = [min(1, math.exp(usual - loss(tokens))) for tokens in written.without_end]
    assert min(expected) < 1
    assert fluency(written.records, truth.records).column("score") == near(expected)
