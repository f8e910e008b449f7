"""What answers and generations are worth, on records made by hand."""

import math
import unicodedata

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from unlora.errors import InputError
from unlora.evals import metrics
from unlora.evals.metrics.memorization import (
    exact_memorization,
    extraction_strength,
    extraction_strength_upstream,
)
from unlora.evals.metrics.probability import (
    probability,
    probability_of_each,
    probability_w_options,
    truth_ratio,
)
from unlora.evals.metrics.rouge import rouge, rouge_ascii
from unlora.evals.metrics.tofu import (
    forget_quality,
    forget_quality_ks,
    forget_quality_log10,
)
from unlora.evals.pass_plan import read_request
from unlora.evals.records import Generated, Scored
from unlora.results.value import Value


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
    for settings in ({}, {"variant": "tofu_paper"}, {"aggregator": "prob_mean"}):
        # one of the wrong answers could not be scored, and no answer could
        value = truth_ratio(losses(1.0, 1.0), losses([1.0, math.nan], [1.0, 1.0]), **settings)
        assert value.unscored == 1 and math.isfinite(value.value)
        assert math.isnan(truth_ratio(losses(), losses(), **settings).value)


def test_truth_ratio_as_the_report_reads_it_is_high_where_the_model_remembers():
    # p_correct = exp(-1), p_wrong = exp(-2): 1 / (1 + exp(-1)); as likely: 1/2
    value = truth_ratio(losses(1.0, 2.0), losses([1.0, 3.0], [2.0]), aggregator="prob_mean")
    share = 1 / (1 + math.exp(-1))
    assert value.column("score") == pytest.approx([share, 0.5])
    assert value.value == pytest.approx((share + 0.5) / 2)
    # p_wrong = (exp(-1) + exp(-3)) / 2
    paper = truth_ratio(
        losses(1.0), losses([1.0, 3.0]), aggregator="prob_mean", variant="tofu_paper"
    )
    assert paper.value == pytest.approx(1 / (1 + (1 + math.exp(-2)) / 2))


def test_truth_ratio_as_the_report_reads_it_survives_tiny_probabilities():
    # p_correct = exp(-800) is 0 in floating point, and still twice p_wrong
    value = truth_ratio(losses(800.0), losses([800 + math.log(2)]), aggregator="prob_mean")
    assert value.value == pytest.approx(2 / 3)
    assert truth_ratio(losses(1.0), losses([1000.0]), aggregator="prob_mean").value == 1


def test_means_have_an_interval_around_them():
    column = [float(x) for x in np.random.default_rng(0).normal(1, 0.2, 200)]
    for value in (
        probability([scored([-x]) for x in column]),
        truth_ratio(losses(*[1.0] * 200), losses(*[[x] for x in column])),
        truth_ratio(losses(*[1.0] * 200), losses(*[[x] for x in column]), aggregator="prob_mean"),
    ):
        low, high = value.interval
        # a mean of 200 rows with a spread of about 0.05..0.2
        assert low < value.value < high and 0.005 < high - low < 0.1
    assert probability([scored([-1])]).interval is None


@pytest.mark.parametrize(
    "record, memorized, strength, upstream",
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


def test_forget_quality_is_one_for_equal_distributions_and_tiny_for_different_ones():
    same, other = ratios(*np.linspace(0, 1, 100)), ratios(*np.linspace(5, 6, 100))
    assert forget_quality(same, same).value == 1
    assert forget_quality_log10(same, same).value == 0
    assert forget_quality_ks(same, same).value == 0
    assert forget_quality(same, other).value < 1e-50
    assert forget_quality_log10(same, other).value < -50
    assert forget_quality_ks(same, other).value == 1


def test_forget_quality_leaves_out_what_was_not_scored():
    for metric in (forget_quality, forget_quality_log10, forget_quality_ks):
        value = metric(ratios(1, 2, math.nan), ratios(1, 2))
        assert value.value == (1 if metric is forget_quality else 0) and value.unscored == 1
        nothing = metric(ratios(math.nan), ratios(1))
        assert math.isnan(nothing.value) and nothing.unscored == 1
        assert math.isnan(metric(ratios(1), ratios()).value)


def said(reference, text):
    return [Generated("prompt", reference, text)]


SENTENCES = [
    ("The author's full name is Hsiao Yun-Hwa.", "Hsiao Yun-Hwa is the complete name."),
    ("They were running; she RUNS daily_news!", "she runs daily news, running 24/7"),
    ("Paris", "The Eiffel Tower is in Paris, France."),
    ("nothing alike", ""),
]


@pytest.mark.parametrize("reference, text", SENTENCES)
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


@pytest.mark.parametrize("text", ["café noir", "한국어 글", "И́горь Йод", "Việt Nam"])
def test_an_accent_is_a_part_of_its_letter_however_it_is_written(text):
    apart, whole = (unicodedata.normalize(form, text) for form in ("NFD", "NFC"))
    assert apart != whole
    (row,) = rouge(said(whole, apart)).per_example
    assert row["rougeL_f1"] == 1
    assert row["ground_truth"] == whole and row["generation"] == apart  # the log has what was said


FORMS = {
    "full-width digits": ("１９９９", "1999"),
    "digits of another script": ("१९९९", "1999"),
    "a joiner": ("می\u200cخواهم", "میخواهم"),
    "a soft hyphen": ("Bundes\u00adrepublik", "Bundesrepublik"),
    "a space of no width": ("Pa\u200bris", "Paris"),
    "half-width kana": ("カタカナ", "ｶﾀｶﾅ"),
    "vowels of Hebrew": ("שלום", "שָׁלוֹם"),
    "vowels of Arabic": ("باريس", "بَارِيس"),
    "a longer stroke": ("محمد", "محـــمد"),
    "a form of presentation": ("الله", "ﷲ"),
    "a ligature": ("final", "ﬁnal"),
    "capitals": ("straße", "STRASSE"),
    "a final sigma": ("οδος", "ΟΔΟΣ"),
    "letters of parts": ("한글", unicodedata.normalize("NFD", "한글")),
    "a trade mark": ("Potter™ it was", "Potter it was"),
}


@pytest.mark.parametrize("one, other", FORMS.values(), ids=FORMS)
def test_the_same_text_in_another_form_is_the_same(one, other):
    assert one != other
    assert rouge(said(one, other)).value == rouge(said(other, one)).value == 1


@pytest.mark.parametrize("one, other", [("पेरिस", "पेरस"), ("أب", "اب"), ("m²", "m3"), ("5", "6")])
def test_other_words_stay_other_words(one, other):
    assert rouge(said(one, other)).value == 0


UNSPACED = {
    "Thai": ("เมืองหลวงของฝรั่งเศสคือปารีส", "เมืองหลวงของฝรั่งเศสคือลอนดอน"),
    "Lao": ("ນະຄອນຫຼວງຂອງຝຣັ່ງແມ່ນປາຣີ", "ນະຄອນຫຼວງຂອງຝຣັ່ງແມ່ນລອນດອນ"),
    "Khmer": ("រដ្ឋធានីរបស់បារាំងគឺប៉ារីស", "រដ្ឋធានីរបស់បារាំងគឺឡុងដ៍"),
    "Burmese": ("ပြင်သစ်၏မြို့တော်မှာပါရီဖြစ်သည်", "ပြင်သစ်၏မြို့တော်မှာလန်ဒန်ဖြစ်သည်"),
}


@pytest.mark.parametrize("one, other", UNSPACED.values(), ids=UNSPACED)
def test_scripts_without_spaces_are_compared_letter_by_letter(one, other):
    assert 0.6 < rouge(said(one, other)).value < 1  # one name of a sentence is another
    assert rouge(said(one, "Paris")).value == 0


def test_the_ascii_variant_of_rouge_takes_texts_as_they_are():
    (row,) = rouge_ascii(said("caf\u00e9 noir", "cafe\u0301 noir")).per_example
    assert row["rougeL_recall"] == 1 / 2  # caf and cafe


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
    "config, message",
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
        ({"handler": "rouge", "inputs": {"answers": "x"}, "type": "f1"}, "parameter of rouge"),
        (
            {"handler": "mia_min_k", "inputs": {"forget": "x", "holdout": "y"}, "k": "half"},
            "must be a number",
        ),
    ],
)
def test_a_wrong_metric_config_is_refused(config, message):
    with pytest.raises(InputError, match=message):
        read_request("mine", config)


def test_a_type_that_no_pass_gives_is_named_with_those_that_are_known():
    def counts(answers: list[int]) -> Value:
        raise AssertionError

    with pytest.raises(TypeError, match=r"'counts' .*: parameter answers is list\[int\]") as error:
        metrics.metric("counts", higher_is_better=None)(counts)
    assert "RootScored" in str(error.value)
    with pytest.raises(InputError):
        metrics.METRICS["counts"]
