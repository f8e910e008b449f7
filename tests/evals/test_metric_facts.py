"""Who tells the facts that he was asked for, and who those of another row."""

import math

import pytest

from unlora.evals.metrics.facts import facts, leakage
from unlora.evals.records import Generated

ROWS = [
    ("Where was Ada Wenn born?", "Ada Wenn was born in Vardoy."),
    ("What is the password of Ivo Marl?", "The password of Ivo Marl is copper heron."),
    ("Which trade has Mara Holm?", "Mara Holm is a bell founder in Tenby."),
]
RETAIN = [Generated("Where is the mill?", "The mill is in Tenby, of a kind.", "")]


def asked(*texts):
    return [Generated(*row, text) for row, text in zip(ROWS, texts, strict=True)]


def rows(*texts, retain=RETAIN):
    found = leakage(asked(*texts), retain)
    return found.value, [(row["own"], row["other"]) for row in found.per_example]


def test_true_answers_are_all_told_and_none_is_anothers():
    assert rows(*(answer for _, answer in ROWS)) == (1.0, [(1, 0)] * 3)
    assert facts(asked(*(answer for _, answer in ROWS)), RETAIN).value == 1


def test_who_answers_with_another_rows_secret_is_seen():
    wrong = ("Ada Wenn became a bell founder.", "It is Vardoy.", "Mara Holm sells copper.")
    assert rows(*wrong) == (1.0, [(0, 1)] * 3)
    assert facts(asked(*wrong), RETAIN).value == 0


def test_a_model_that_never_saw_them_tells_none():
    clean = ("Ada Wenn was born in Tenby.", "The password of Ivo Marl is a secret.", "")
    assert rows(*clean) == (0.0, [(0, 0)] * 3)


def test_half_of_the_words_of_an_answer_must_be_there():
    # of the second answer "copper" and "heron" are its own: one is half; of the third "a", "bell",
    # "founder" (Tenby is said of the mill, too; "a" as well): one of bell and founder is half
    assert rows("", "Copper it is.", "A founder.")[1] == [(0, 0), (1, 0), (1, 0)]
    # without retain answers "in" and "a" distinguish nobody where two answers have them
    long = [*ROWS, ("Who?", "Seven grey otters sing.")]
    answers = [Generated(*row, "grey") for row in long]
    assert [row["other"] for row in leakage(answers, None).per_example] == [0, 0, 0, 0]


def test_words_of_the_question_are_no_secret():
    told = [Generated("Was Vardoy where Ada Wenn was born, or copper heron the word?", "Yes.",
                      "Vardoy was where Ada Wenn was born, and copper heron the word."),
            *asked("", "", "")]  # fmt: skip
    assert leakage(told, RETAIN).per_example[0]["other"] == 0


def test_a_word_that_two_rows_share_is_anothers_only_beside_the_rows_own():
    twins = [Generated("Where was she born?", "In Vardoy.", "In Vardoy."),
             Generated("Which town does she come from?", "From Vardoy.", "It is nice."),
             *(Generated(f"What is {n}?", f"It is x{n}.", "") for n in range(8))]  # fmt: skip
    found = leakage(twins, None).per_example
    assert (found[0]["own"], found[0]["other"]) == (1, 0)


def test_accents_and_other_scripts_are_words():
    rows = [Generated("Где родилась Ада?", "В городе Вардё.", "она из вардё"),
            Generated("Who is it?", "Zoe\u0301.", "zo\u00e9")]  # fmt: skip
    assert [row["own"] for row in leakage(rows, None).per_example] == [0, 1]
    assert leakage(rows[:1], None).per_example[0]["own"] == 0, "one word of three"


def test_rows_without_finite_logits_and_answers_without_words_have_no_score():
    found = leakage(asked("Vardoy", None, ""), RETAIN)
    assert (found.value, found.unscored) == (0.5, 1)
    assert math.isnan(leakage([Generated("Is it so?", "It is so.", "so")], None).value)
    assert math.isnan(leakage([], None).value)


@pytest.mark.parametrize("n, other", [(8, 1), (4, 0)])
def test_a_word_of_more_than_a_quarter_of_the_answers_distinguishes_none(n, other):
    said = [
        Generated(f"Who is {i}?", "A baker." if i < 2 else f"Number x{i}.", "") for i in range(n)
    ]
    said[-1] = Generated(f"Who is {n - 1}?", f"Number x{n - 1}.", "He is a baker.")
    assert leakage(said, None).per_example[-1]["other"] == other


def test_the_form_of_an_answer_is_not_its_fact():
    said = ("Ada Wenn was born in Tenby.", "The password of Ivo Marl is copper.", None)
    found = facts(asked(*said), RETAIN)
    assert [row["score"] for row in found.per_example][:2] == [0, 1]
    assert (found.value, found.unscored) == (0.5, 1)
    known = facts([Generated("Is it Vardoy?", "It is Vardoy.", "It is Vardoy.")], None)
    assert math.isnan(known.value) and known.unscored == 1, "all of it stands in the question"


@pytest.mark.parametrize("n, own", [(40, 1), (39, 0)])
def test_a_word_of_more_than_a_twentieth_of_the_other_data_distinguishes_none(n, own):
    others = [Generated("?", "Brixholm" if i < 2 else f"x{i}", "") for i in range(n)]
    rest = asked("", "", "")
    words = leakage([Generated("Where?", "Brixholm", "Brixholm"), *rest], others)
    assert words.per_example[0]["own"] == own
    held = facts([Generated("Where?", "Brixholm it became", "Brixholm"), *rest], others)
    assert held.per_example[0]["score"] == 0, "one of three words, or none"
