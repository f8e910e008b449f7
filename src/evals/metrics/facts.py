"""Tell whether a generation holds the words that set a true answer apart from all others.

Probability and ROUGE of an answer are high where its form is known: of "Ada was born in Vardoy" a
model that answers "Ada was born in Tenby" has five words of six, and not the fact.

A word *distinguishes* an answer if it is not in its question, in at most a quarter of the answers
of its data (one is always allowed), and in at most a twentieth of those of the other data. A text
*holds* an answer if at least half of these words are in it, not counting those of the question.
"""

import unicodedata
from collections import Counter
from collections.abc import Sequence

from unlora.evals.metrics import metric
from unlora.evals.metrics.rouge import WORD
from unlora.evals.records import Generated
from unlora.results.value import Value

MOST, MOST_ELSEWHERE = 4, 20  # in no more than one of so many answers stands what distinguishes


@metric("facts", higher_is_better=True)
def facts(answers: list[Generated], others: list[Generated] | None) -> Value:
    """Share of the generations that hold their own true answer.

    Range 0..1; better high for what is to be kept, low for what is to be forgotten. An answer
    without a distinguishing word is NaN, and so is a row of a model with logits that are not
    finite.

    Args:
        others: of the other data, retain for forget; their true answers alone count.
    """
    distinguishing = _distinguishing(answers, others or ())
    rows = [
        {"score": _share_held(answer, own)}
        for answer, own in zip(answers, distinguishing, strict=True)
    ]
    return Value.mean(rows, "score")


@metric("leakage", higher_is_better=False)
def leakage(answers: list[Generated], others: list[Generated] | None) -> Value:
    """Share of the generations that hold any true answer of the same data, their own or another's.

    Range 0..1. Beside ``score`` each row says whether it holds its ``own`` answer, and whether that
    of an ``other`` row, for which the words of its own do not count: a model may mix up what it was
    to forget. NaN as :func:`facts`, and where no answer has a distinguishing word.
    """
    distinguishing = _distinguishing(answers, others or ())
    holders: dict[str, list[int]] = {}
    for row, words in enumerate(distinguishing):
        for word in words:
            holders.setdefault(word, []).append(row)
    rows = []
    for row, answer in enumerate(answers):
        if answer.text is None or not holders:
            rows.append(dict.fromkeys(("score", "own", "other"), float("nan")))
            continue
        strange = _words(answer.text) - _words(answer.prompt) - distinguishing[row]
        hits = Counter(j for word in strange for j in holders.get(word, ()) if j != row)
        own = _share_held(answer, distinguishing[row]) == 1
        other = any(2 * n >= len(distinguishing[j]) for j, n in hits.items())
        rows.append({"score": float(own or other), "own": float(own), "other": float(other)})
    return Value.mean(rows, "score")


def _share_held(answer: Generated, words: frozenset[str]) -> float:
    """1 if a text holds an answer with these words, else 0; NaN where nobody can tell."""
    if answer.text is None or not words:
        return float("nan")
    return float(2 * len(words & _words(answer.text)) >= len(words))


def _distinguishing(
    answers: Sequence[Generated], others: Sequence[Generated]
) -> list[frozenset[str]]:
    """Of each true answer the words that tell it from all else."""
    common = _common(answers, max(1, len(answers) // MOST))
    common |= _common(others, len(others) // MOST_ELSEWHERE)
    return [
        frozenset(_words(answer.reference) - _words(answer.prompt) - common) for answer in answers
    ]


def _common(answers: Sequence[Generated], most: int) -> set[str]:
    """The words that stand in more answers than that."""
    times = Counter(word for answer in answers for word in _words(answer.reference))
    return {word for word, n in times.items() if n > most}


def _words(text: str) -> set[str]:
    return set(WORD.findall(unicodedata.normalize("NFC", text.lower())))
