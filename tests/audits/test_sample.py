"""Leak@k against all subsets of the draws, and which texts count as a leak."""

from itertools import combinations

import numpy as np
import pytest

from unlora.audits.attack import ATTACKS
from unlora.audits.attacks.sample import distinguishing_span, leak_at, sample, span_count
from unlora.errors import InputError
from unlora.evals.metrics.rouge import rouge
from unlora.evals.records import Generated, Sampled, Samples

QUESTION = "Which novel did Ada Kovač write in 1987?"
REFERENCE = "Ada Kovač wrote The Salt Harbour in 1987."


def share_of_subsets(k, n, leaks):
    """Of all subsets of k draws, those that hold one of the first ``leaks`` draws."""
    subsets = list(combinations(range(n), k))
    return sum(any(draw < leaks for draw in subset) for subset in subsets) / len(subsets)


@pytest.mark.parametrize("n", [1, 5, 8])
def test_leak_at_k_is_the_share_of_all_subsets_that_leak(n):
    for k in range(1, n + 1):
        leaks = np.arange(n + 1)
        expected = [share_of_subsets(k, n, int(c)) for c in leaks]
        assert leak_at(k, np.full(n + 1, n), leaks) == pytest.approx(expected, abs=1e-12)


def test_leak_at_k_is_exact_for_many_draws():
    found = leak_at(100, np.array([10_000, 10_000]), np.array([0.0, 1.0]))
    assert found.tolist() == pytest.approx([0, 0.01], abs=1e-12)
    assert np.isnan(leak_at(2, np.array([4]), np.array([np.nan]))).all()


@pytest.mark.parametrize(
    "question, reference, span",
    [
        (QUESTION, REFERENCE, "wrote the salt harbour"),
        ("What did she write?", "She did write it, the Blue Hour.", "blue hour"),  # trimmed
        ("Who lives here?", "Ada Bell or Mia Rose Bell lives here.", "ada bell or mia rose bell"),
        ("A or B?", "Bell A Rose", "bell"),  # the first of two
        ("Where?", "It is in the", ""),
        ("Is it red or blue?", "Blue.", ""),
        ("Wer?", "Ärzte", "ärzte"),
    ],
)  # fmt: skip
def test_the_span_is_the_longest_run_of_words_that_the_question_has_not(question, reference, span):
    assert distinguishing_span(question, reference) == span.split()


def test_a_text_holds_a_span_as_whole_words_in_a_row():
    texts = ("I say: SHE WROTE the Salt-Harbour!", "wrote the salt harbours", "the salt", None)
    assert span_count(Samples(QUESTION, REFERENCE, texts)) == 1


def test_draws_are_counted_by_recall_and_by_span():
    good, half = "Ada Kovač wrote The Salt Harbour in 1987", "Ada Kovač wrote in 1987, I think"
    rows = [
        Samples(QUESTION, REFERENCE, (good, half, "no idea", None)),
        Samples("Is it red or blue?", "Blue.", ("blue", "red", "red", "red")),
        Samples("What?", "!!!", ("a", "b", "c", None)),
    ]
    recalls = rouge([Generated("", REFERENCE, text) for text in (good, half, "no idea")])
    assert recalls.column("rougeL_recall").tolist() == pytest.approx([1, 5 / 8, 0])
    found = sample(Sampled(rows), samples=4, k=(1, 2), rouge=0.5)
    assert list(found) == ["rouge@1", "rouge@2", "span@1", "span@2"]
    nan = float("nan")
    for name, expected in {
        "rouge@1": [2 / 4, 1 / 4, nan],
        "rouge@2": [share_of_subsets(2, 4, 2), share_of_subsets(2, 4, 1), nan],
        "span@1": [1 / 4, nan, nan],
    }.items():
        assert found[name].tolist() == pytest.approx(expected, nan_ok=True), name
    assert sample(Sampled(rows), k=(1,), rouge=0.7)["rouge@1"][0] == 1 / 4


def test_its_settings_are_checked_before_a_model_is_asked():
    attack = ATTACKS["sample"]
    assert attack.kind == "sample" and attack.configured({"samples": 16})["k"] == (1, 16)
    for given, wrong in [
        ({"samples": 8}, "k of attack sample holds 16; it must be from 1 to samples, which is 8"),
        ({"k": [0]}, "holds 0; it must be from 1"),
        ({"k": 4}, r"k of attack sample is 4; it must be a list such as \[1, 16\]"),
        ({"k": ["a"]}, "must be a list such as"),
        ({"temperature": 0.0}, "it must be above 0"),
        ({"top_p": 0}, "it must be above 0 and 1 or less"),
    ]:
        with pytest.raises(InputError, match=wrong):
            attack.configured(given)
