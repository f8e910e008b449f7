"""Membership inference, and the distance from a model that never saw the forget data."""

import math
import zlib

import numpy as np
import pytest
from scipy.stats import bootstrap
from sklearn.metrics import roc_auc_score

from unlora.evals.metrics import mia
from unlora.evals.metrics.mia import (
    mia_gradnorm,
    mia_loss,
    mia_min_k,
    mia_min_k_plus_plus,
    mia_recall,
    mia_reference,
    mia_zlib,
)
from unlora.evals.metrics.privacy import privleak, privleak_bounded, rel_diff
from unlora.evals.records import Scored
from unlora.results.value import Value


def scored(logp=(), mean=None, var=None, text="text", ended=False):
    logp = np.array(logp, dtype=np.float64)
    mean = np.array([0.0] * len(logp) if mean is None else mean)
    var = np.array([1.0] * len(logp) if var is None else var)
    return Scored(logp, logp > -1, mean, var, text, ended)


def lost(*values):
    return [scored([-value]) for value in values]


def of_forget(value):
    return [row["score"] for row in value.per_example["forget"]]


def test_auc_is_one_when_every_member_has_the_lower_loss():
    members, others = lost(1, 2), lost(3, 4)
    assert mia_loss(members, others).value == 1
    assert mia_loss(others, members).value == 0


def test_ties_count_half():
    assert mia_loss(lost(1), lost(1)).value == 0.5
    # pairs (1,1) tie, (1,2) right, (2,1) wrong, (2,2) tie -> 0.5
    assert mia_loss(lost(1, 2), lost(1, 2)).value == 0.5
    # (1,1) tie, (1,1) tie, (1,2) right -> (0.5 + 0.5 + 1) / 3
    assert mia_loss(lost(1), lost(1, 1, 2)).value == pytest.approx(2 / 3)


def test_auc_equals_that_of_scikit_learn_with_and_without_ties():
    rng = np.random.default_rng(0)
    for digits in (0, 1, 15):
        members, others = rng.normal(size=50).round(digits), rng.normal(0.5, 1, 31).round(digits)
        expected = roc_auc_score(np.repeat((0, 1), (50, 31)), np.concatenate((members, others)))
        assert mia_gradnorm(members, others).value == pytest.approx(expected, abs=1e-12)


def test_the_interval_of_an_auc_is_the_bootstrap_within_each_side(monkeypatch):
    rng = np.random.default_rng(1)
    members, others = rng.normal(size=40).round(1), rng.normal(0.7, 1, 25).round(1)

    def area(left, right):
        return (left[:, None] < right).mean() + (left[:, None] == right).mean() / 2

    expected = bootstrap(
        (members, others), area, vectorized=False, n_resamples=2000, method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    value = mia_gradnorm(members, others)
    # two bootstraps of 2000 draws; their ends spread by some 0.003
    assert value.interval == pytest.approx((expected.low, expected.high), abs=0.015)
    assert value.interval[0] < value.value < value.interval[1]
    assert mia_gradnorm(members, others) == value
    monkeypatch.setattr(mia, "CELLS_AT_ONCE", 1000)  # in many parts
    assert mia_gradnorm(members, others) == value
    assert mia_gradnorm(members, others[:1]).interval is None
    assert mia_gradnorm([1.0, 2.0], [3.0, 4.0]).interval == (1, 1)


def test_membership_without_one_side_is_nan_and_counted():
    value = mia_min_k([scored()], [scored([-1])])
    assert math.isnan(value.value) and value.unscored == 1 and value.interval is None
    assert math.isnan(mia_loss([], []).value)
    assert math.isnan(mia_gradnorm([math.nan], [1.0]).value)


@pytest.mark.parametrize("metric", [mia_loss, mia_zlib, mia_min_k, mia_min_k_plus_plus])
def test_an_example_without_a_score_is_counted_and_left_out(metric):
    members, others = lost(1, 2), lost(1.5, 3)
    whole = metric(members, others)
    more = metric([scored(), *members], [*others, scored()])
    assert more.value == whole.value == 0.75 and more.unscored == 2
    assert more.interval == whole.interval
    assert math.isnan(of_forget(more)[0]) and len(more.per_example["holdout"]) == 3


def test_the_end_token_alone_has_a_loss_but_no_lowest_token():
    end = scored([-1], ended=True)
    assert of_forget(mia_loss([end], [end])) == [1]
    for metric in (mia_min_k, mia_min_k_plus_plus):
        assert metric([end], [end]).unscored == 2


def test_min_k_takes_the_least_likely_share_without_the_end_token():
    # of -1 -2 -3 -4 -5 the lowest 40 % are -5 -4; the end token -9 is not part of it
    record = scored([-1, -5, -3, -4, -2, -9], ended=True)
    assert of_forget(mia_min_k([record], [record])) == pytest.approx([4.5])
    one = scored([-2])  # at least one token
    assert of_forget(mia_min_k([one], [one], k=0.1)) == pytest.approx([2])


def test_min_k_plus_plus_standardises_over_the_vocabulary():
    # (-3 - -1) / sqrt(4) = -1 and (-1 - -1) / sqrt(4) = 0; the lower half is -1
    record = scored([-3, -1], mean=[-1, -1], var=[4, 4])
    assert of_forget(mia_min_k_plus_plus([record], [record], k=0.5)) == pytest.approx([1])


def test_zlib_divides_by_the_compressed_size():
    record = scored([-2], text="ab" * 50)
    assert of_forget(mia_zlib([record], [record])) == [2 / len(zlib.compress(b"ab" * 50))]


def test_the_reference_attack_takes_off_what_the_root_model_makes_of_it():
    # 1 - 4 and 2 - 2 against 1 - 1 and 5 - 6: the pair (0, 0) ties, (0, -1) is wrong
    value = mia_reference(lost(1, 2), lost(1, 5), lost(4, 2), lost(1, 6))
    assert of_forget(value) == [-3, 0]
    assert [row["score"] for row in value.per_example["holdout"]] == [0, -1]
    assert value.value == (1 + 1 + 0.5 + 0) / 4
    # where the model is the root, nothing tells the two apart
    assert mia_reference(lost(1, 2), lost(3, 4), lost(1, 2), lost(3, 4)).value == 0.5


def test_the_reference_attack_needs_both_models():
    value = mia_reference([scored(), *lost(1, 1)], lost(2), [*lost(1), scored(), *lost(1)], lost(1))
    assert value.unscored == 2 and value.value == 1
    with pytest.raises(ValueError, match="shorter"):
        mia_reference(lost(1, 2), lost(1), lost(1), lost(1))


def test_gradient_norms_are_low_for_members():
    value = mia_gradnorm([0.1, math.nan, 0.3], [0.2, 0.4])
    # (0.1,0.2) (0.1,0.4) (0.3,0.4) right, (0.3,0.2) wrong
    assert value.value == 0.75 and value.unscored == 1


def test_recall_finds_the_members_that_other_texts_disturb():
    # loss after / before: 3 / 1 and 4 / 2 for members, 4 / 4 and 3 / 2 for the others
    value = mia_recall(lost(1, 2), lost(4, 2), lost(3, 4), lost(4, 3))
    assert of_forget(value) == pytest.approx([-3, -2]) and value.value == 1
    # a text that is certain in both settings is not disturbed
    certain = mia_recall(lost(0), lost(1), lost(0), lost(1))
    assert of_forget(certain) == [-1] and certain.value == 0.5


def test_recall_leaves_out_what_was_cut_or_shown():
    whole, cut = scored([-1, -1, -1]), scored([-1, -1])
    value = mia_recall([whole, whole], [whole, whole], [whole, cut], [scored(), whole])
    assert value.unscored == 2 and value.value == 0.5
    assert math.isnan(of_forget(value)[1])


@pytest.mark.parametrize("auc, expected", [(0.4, 0), (1.0, -100), (0.1, 50)])
def test_privleak_is_the_relative_distance_from_the_retain_model(auc, expected):
    assert privleak(Value(auc), Value(0.4)).value == pytest.approx(expected)


@pytest.mark.parametrize(
    "auc, retain, expected",
    # 1 - 0.1 / 0.4; 1 - 0.6 / 0.4 is below 0; near a retain AUC of 1 privleak is 1e9 percent
    [(0.4, 0.4, 1), (0.5, 0.4, 0.75), (0.3, 0.4, 0.75), (1.0, 0.4, 0), (0.9, 1.0, 0.9), (1, 0, 0)],
)
def test_privleak_bounded_stays_between_0_and_1(auc, retain, expected):
    assert privleak_bounded(Value(auc), Value(retain)).value == pytest.approx(expected)


@pytest.mark.parametrize("value, expected", [(0.3, -25), (0.4, 0), (0.6, 50)])
def test_rel_diff_is_in_percent_of_the_retain_models_value(value, expected):
    assert rel_diff(Value(value), Value(0.4)).value == pytest.approx(expected)


@pytest.mark.parametrize("metric", [privleak, privleak_bounded, rel_diff])
def test_no_distance_from_or_to_nothing(metric):
    found = metric(Value(math.nan, unscored=3), Value(0.4))
    assert math.isnan(found.value) and found.unscored == 3
    assert math.isnan(metric(Value(0.4), Value(math.nan)).value)
