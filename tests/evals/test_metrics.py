"""Each metric on records made by hand."""

import math
import zlib

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from unlora.errors import InputError
from unlora.evals.metrics.likelihood import (
    probability,
    probability_of_each,
    probability_w_options,
    truth_ratio,
)
from unlora.evals.metrics.memorization import (
    exact_memorization,
    extraction_strength,
    extraction_strength_upstream,
)
from unlora.evals.metrics.mia import (
    mia_loss,
    mia_min_k,
    mia_min_k_plus_plus,
    mia_zlib,
    privleak,
    privleak_bounded,
)
from unlora.evals.metrics.rouge import rouge, rouge_ascii
from unlora.evals.metrics.tofu import (
    forget_quality,
    forget_quality_ks,
    forget_quality_log10,
    model_utility,
)
from unlora.evals.plan import read_request
from unlora.evals.records import Generated, Scored, Value


def scored(logp=(), hit=None, mean=None, var=None, text="text", ended=False):
    logp = np.array(logp, dtype=np.float32)
    hit = np.array([False] * len(logp) if hit is None else hit, dtype=bool)
    mean = np.array([0.0] * len(logp) if mean is None else mean, dtype=np.float32)
    var = np.array([1.0] * len(logp) if var is None else var, dtype=np.float32)
    return Scored(logp, hit, mean, var, text, ended)


def hits(*pattern, ended=False):
    return scored([-1.0] * len(pattern), pattern, ended=ended)


def losses(*values):
    return Value(0.0, [{"avg_loss": v, "prob": np.exp(-np.array(v)).tolist()} for v in values])


def ratios(*values):
    return Value(0.0, [{"score": v} for v in values])


def test_probability_is_the_geometric_mean_with_the_end_token():
    # exp(-(1 + 3) / 2) = exp(-2)
    value = probability([scored([-1, -3], ended=True), scored([-1, -1])])
    assert [row["avg_loss"] for row in value.per_example] == [2, 1]
    assert value.value == pytest.approx((math.exp(-2) + math.exp(-1)) / 2)


def test_an_empty_answer_is_counted_and_not_averaged_in():
    value = probability([scored(), scored([-1])])
    assert value.value == pytest.approx(math.exp(-1)) and value.unscored == 1
    assert math.isnan(value.per_example[0]["prob"])


@pytest.mark.parametrize(
    "metric",
    [probability, exact_memorization, extraction_strength, extraction_strength_upstream],
)
@pytest.mark.parametrize("records", [[], [scored()], [scored([-1], ended=True)]])
def test_nothing_to_score_is_nan(metric, records):
    if metric is probability and len(records) and len(records[0].logp):
        records = [scored()]  # the end token alone still has a probability
    value = metric(records)
    assert math.isnan(value.value) and value.unscored == len(records)


def test_probability_of_each_keeps_every_answer():
    value = probability_of_each([[scored([-1]), scored([-2, -2])]])
    assert value.per_example[0]["avg_loss"] == [1, 2]
    assert value.value == pytest.approx((math.exp(-1) + math.exp(-2)) / 2)


def test_probability_with_options_is_a_share():
    correct = Value(0, [{"prob": 0.2}])
    wrong = Value(0, [{"prob": [0.1, 0.1]}])
    assert probability_w_options(correct, wrong).value == pytest.approx(0.5)


def test_truth_ratio_takes_the_geometric_mean_as_published():
    # p_wrong = exp(-(1 + 3) / 2), p_correct = exp(-1): R = exp(-1)
    value = truth_ratio(losses(1.0), losses([1.0, 3.0]))
    assert value.per_example[0]["score"] == pytest.approx(math.exp(-1))
    assert value.value == pytest.approx(1 - math.exp(-1))


def test_truth_ratio_of_the_paper_takes_the_arithmetic_mean():
    # p_wrong = (exp(-1) + exp(-3)) / 2
    value = truth_ratio(losses(1.0), losses([1.0, 3.0]), variant="tofu_paper")
    assert value.per_example[0]["score"] == pytest.approx((1 + math.exp(-2)) / 2)


def test_truth_ratio_of_forget_data_is_best_at_one():
    one, two, half = (
        truth_ratio(losses(1.0), losses([1.0 + shift]), aggregator="closer_to_1_better").value
        for shift in (0, -math.log(2), math.log(2))
    )
    assert one == pytest.approx(1) and two == pytest.approx(0.5) and half == pytest.approx(0.5)


def test_truth_ratio_skips_and_counts_what_was_not_scored():
    value = truth_ratio(losses(1.0, math.nan), losses([1.0], [1.0]))
    assert value.unscored == 1 and value.value == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("record", "memorized", "strength", "upstream"),
    [
        (hits(1, 1, 1, 1), 1, 1, 1),
        (hits(0, 0, 0, 0), 0, 0, 0.25),
        (hits(1, 1, 1, 0), 0.75, 0, 0.25),
        (hits(1, 0, 1, 1), 0.75, 0.5, 0.5),
        (hits(0, 1, 1, 1, 0, ended=True), 0.75, 0.75, 0.75),  # the end token does not count
        (hits(0, 1, 1, 1, 0), 0.6, 0, 0.2),  # without one the last token does
        (hits(1), 1, 1, 1),
        (hits(0), 0, 0, 1),
    ],
)
def test_memorization(record, memorized, strength, upstream):
    assert exact_memorization([record]).value == pytest.approx(memorized)
    assert extraction_strength([record]).value == pytest.approx(strength)
    assert extraction_strength_upstream([record]).value == pytest.approx(upstream)


def test_auc_is_one_when_every_member_has_the_lower_loss():
    members, others = [scored([-1]), scored([-2])], [scored([-3]), scored([-4])]
    assert mia_loss(members, others).value == 1
    assert mia_loss(others, members).value == 0


def test_ties_count_half():
    assert mia_loss([scored([-1])], [scored([-1])]).value == 0.5
    # pairs (1,1) tie, (1,2) right, (2,1) wrong, (2,2) tie -> 0.5
    both = [scored([-1]), scored([-2])]
    assert mia_loss(both, both).value == 0.5


def test_membership_without_one_side_is_nan_and_counted():
    value = mia_min_k([scored()], [scored([-1])])
    assert math.isnan(value.value) and value.unscored == 1
    assert math.isnan(mia_loss([], []).value)


def test_min_k_takes_the_least_likely_share_without_the_end_token():
    # of -1 -2 -3 -4 -5 the lowest 40 % are -5 -4; the end token -9 is not part of it
    record = scored([-1, -5, -3, -4, -2, -9], ended=True)
    assert mia_min_k([record], [record]).per_example["forget"][0]["score"] == pytest.approx(4.5)
    one = scored([-2])  # at least one token
    assert mia_min_k([one], [one], k=0.1).per_example["holdout"][0]["score"] == pytest.approx(2)


def test_min_k_plus_plus_standardises_over_the_vocabulary():
    # (-3 - -1) / sqrt(4) = -1 and (-1 - -1) / sqrt(4) = 0; the lower half is -1
    record = scored([-3, -1], mean=[-1, -1], var=[4, 4])
    value = mia_min_k_plus_plus([record], [record], k=0.5)
    assert value.per_example["forget"][0]["score"] == pytest.approx(1)


def test_zlib_divides_by_the_compressed_size():
    record = scored([-2], text="ab" * 50)
    size = len(zlib.compress(b"ab" * 50))
    assert mia_zlib([record], [record]).per_example["forget"][0]["score"] == 2 / size


@pytest.mark.parametrize(("auc", "expected"), [(0.4, 0), (1.0, -100), (0.1, 50)])
def test_privleak_is_the_relative_distance_from_the_retain_model(auc, expected):
    assert privleak(Value(auc), Value(0.4)).value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("auc", "retain", "expected"),
    # 1 - 0.1 / 0.4; 1 - 0.6 / 0.4 is below 0; near a retain AUC of 1 privleak is 1e9 percent
    [(0.4, 0.4, 1), (0.5, 0.4, 0.75), (0.3, 0.4, 0.75), (1.0, 0.4, 0), (0.9, 1.0, 0.9), (1, 0, 0)],
)
def test_privleak_bounded_stays_between_0_and_1(auc, retain, expected):
    assert privleak_bounded(Value(auc), Value(retain)).value == pytest.approx(expected)
    assert math.isnan(privleak_bounded(Value(math.nan), Value(retain)).value)


def test_forget_quality_is_one_for_equal_distributions_and_tiny_for_different_ones():
    same, other = ratios(*np.linspace(0, 1, 100)), ratios(*np.linspace(5, 6, 100))
    assert forget_quality(same, same).value == 1
    assert forget_quality_log10(same, same).value == 0
    assert forget_quality_ks(same, same).value == 0
    assert forget_quality(same, other).value < 1e-50
    assert forget_quality_log10(same, other).value < -50
    assert forget_quality_ks(same, other).value == 1


def test_forget_quality_leaves_out_what_was_not_scored():
    assert forget_quality(ratios(1, 2, math.nan), ratios(1, 2)).value == 1
    assert math.isnan(forget_quality(ratios(math.nan), ratios(1)).value)


def test_model_utility_is_a_harmonic_mean():
    assert model_utility([Value(0.5), Value(1.0)]).value == pytest.approx(2 / 3)
    assert model_utility([Value(0.0), Value(1.0)]).value == 0
    assert math.isnan(model_utility([Value(math.nan), Value(1.0)]).value)


def said(reference, text):
    return [Generated("prompt", reference, text)]


SENTENCES = [
    ("The author's full name is Hsiao Yun-Hwa.", "Hsiao Yun-Hwa is the complete name."),
    ("They were running; she RUNS daily_news!", "she runs daily news, running 24/7"),
    ("Paris", "The Eiffel Tower is in Paris, France."),
    ("nothing alike", ""),
]


@pytest.mark.parametrize(("reference", "text"), SENTENCES)
def test_rouge_equals_rouge_score_on_ascii_text(reference, text):
    expected = RougeScorer(["rouge1", "rougeL"], use_stemmer=True).score(reference, text)
    for metric in (rouge, rouge_ascii):
        row = metric(said(reference, text)).per_example[0]
        assert row["rouge1_recall"] == expected["rouge1"].recall
        assert row["rougeL_f1"] == expected["rougeL"].fmeasure
        assert row["rougeL_recall"] == expected["rougeL"].recall


@pytest.mark.parametrize(
    "text", ["Анна Ахматова родилась в Одессе", "李白是唐代诗人", "हिन्दी भाषा"]
)
def test_identical_text_in_any_script_scores_one(text):
    assert rouge(said(text, text)).value == 1
    published = rouge_ascii([*said(text, text), *said("a b", "a b")])  # no word it can see
    assert published.value == 0.5 and published.unscored == 0


def test_unspaced_scripts_are_compared_by_character():
    # 4 of the 6 characters, in order
    assert rouge(said("李白是唐代人", "李白唐人")).value == pytest.approx(4 / 6)


def test_a_reference_without_words_is_not_scored():
    value = rouge([*said("...", "text"), *said("a b", "a")])
    assert value.value == 0.5 and value.unscored == 1


@pytest.mark.parametrize("metric", [rouge, rouge_ascii])
def test_a_model_that_wrote_nothing_of_its_own_is_not_scored(metric):
    value = metric([*said("a b", None), *said("a b", "a")])
    assert value.value == 0.5 and value.unscored == 1
    assert math.isnan(metric(said("a b", None)).value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"handler": "rogue", "inputs": {"answers": "x"}}, "Did you mean 'rouge'"),
        ({"handler": "rouge", "inputs": {"answer": "x"}}, "Did you mean 'answers'"),
        ({"handler": "rouge", "inputs": {}}, "needs the input 'answers'"),
        ({"handler": "rouge", "inputs": {"answers": ["x"]}}, "must be one name"),
        ({"handler": "model_utility", "inputs": {"parts": "x"}}, "must be a list of names"),
        (
            {"handler": "rouge", "inputs": {"answers": "x"}, "rouge_type": "rougeL"},
            "rougeL_recall",
        ),
        ({"handler": "rouge", "inputs": {"answers": "x"}, "type": "f1"}, "setting of rouge"),
        (
            {"handler": "mia_min_k", "inputs": {"forget": "x", "holdout": "y"}, "k": "half"},
            "must be a number",
        ),
    ],
)
def test_a_wrong_metric_config_is_refused(config, message):
    with pytest.raises(InputError, match=message):
        read_request("mine", config)
