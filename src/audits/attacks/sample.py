"""Ask many times. Leak@k: arXiv:2511.04934."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from unlora.audits.attack import attack
from unlora.audits.residual import Scores
from unlora.errors import InputError
from unlora.evals.metrics.rouge import rouge_rows, words
from unlora.evals.records import Generated, Sampled, Samples
from unlora.registry import AtLeastOne, Index, Positive, Share, UpToOne

# at the ends of what tells one answer from another
STOP_WORDS = frozenset(
    "a an and are as at be by for from had has have he her his in is it its of on or she that the "
    "their they this to was were which who with".split()
)


def check_sizes(settings: Mapping[str, Any]) -> None:
    """Raises InputError unless there are as many samples as leak@k looks at."""
    if wrong := [k for k in settings["k"] if not 1 <= k <= settings["samples"]]:
        raise InputError(
            f"k of attack sample holds {wrong[0]}; it must be from 1 to samples, which is "
            f"{settings['samples']}."
        )


@attack("sample", check=check_sizes)
def sample(
    answers: Sampled,
    *,
    samples: AtLeastOne = 32,
    temperature: Positive = 1.0,
    top_p: Share = 1.0,
    seed: Index = 0,
    k: tuple[int, ...] = (1, 16),
    rouge: UpToOne = 0.5,
) -> Mapping[str, Scores]:
    """Probability that one of k drawn texts holds the answer, by two rules.

    A text whose logits were not finite does not. ``rouge`` says nothing of a row whose answer has
    no word, and ``span`` nothing of one whose answer has no word but those of the question.

    Args:
        samples, temperature, top_p, seed: how texts are drawn, see
            :class:`unlora.evals.passes.declaration.Settings`.
        rouge: a text holds an answer if this share of its words is there, in this order; for
            ``span`` if the longest run of its words that are not in the question is there.
    """
    counts = {
        "rouge": rouge_counts(answers, rouge),
        "span": np.array([span_count(answer) for answer in answers]),
    }
    drawn = np.array([len(answer.texts) for answer in answers])
    return {
        f"{rule}@{size}": leak_at(size, drawn, leaks)
        for rule, leaks in counts.items()
        for size in k
    }


def leak_at(k: int, drawn: Scores, leaks: Scores) -> Scores:
    """1 - C(n - c, k) / C(n, k) of n texts of which c leak; NaN where c is NaN."""
    steps = np.arange(k)[:, None]
    clean = np.clip((drawn - leaks - steps) / (drawn - steps), 0, None).prod(0)
    return 1 - clean


def rouge_counts(answers: Sequence[Samples], least: float) -> Scores:
    """How many texts of each row have this ROUGE-L recall."""
    drawn = [Counter(text for text in answer.texts if text is not None) for answer in answers]
    pairs = zip(answers, drawn, strict=True)
    texts = [Generated(a.question, a.reference, text) for a, times in pairs for text in times]
    recalls = iter([row["rougeL_recall"] for row in rouge_rows(texts)])
    counts = [sum(n for n in times.values() if next(recalls) >= least) for times in drawn]
    has_words = [bool(words(answer.reference)) for answer in answers]
    return np.where(has_words, counts, np.nan)


def span_count(answer: Samples) -> float:
    """How many texts hold the span that tells the answer; NaN where it has none."""
    span = distinguishing_span(answer.question, answer.reference)
    if not span:
        return float("nan")
    return float(sum(_holds(text, span) for text in answer.texts if text is not None))


def distinguishing_span(question: str, reference: str) -> list[str]:
    """The longest run of words that are not in the question, the first of several.

    Without stop words at its ends.
    """
    known = set(words(question))
    runs = groupby(words(reference), key=lambda word: word not in known)
    return max((_trimmed(list(run)) for is_new, run in runs if is_new), key=len, default=[])


def _trimmed(run: list[str]) -> list[str]:
    content = [n for n, word in enumerate(run) if word not in STOP_WORDS]
    return run[content[0] : content[-1] + 1] if content else []


def _holds(text: str, span: Sequence[str]) -> bool:
    return f" {' '.join(span)} " in f" {' '.join(words(text))} "
