"""Measure how much of the expected text a generation contains. Lin 2004."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Literal, get_args

import regex
from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer

from unlora.evals.metrics import metric
from unlora.evals.records import Generated
from unlora.results.value import Value

RougeType = Literal["rouge1_recall", "rougeL_f1", "rougeL_recall"]
ASCII_WORD = re.compile(r"[a-z0-9]+")
# scripts written without spaces are compared letter by letter, each with its marks; those of South
# East Asia (Thai, Lao, Khmer, Burmese, ...) are what Unicode calls SA
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Yi}\p{Javanese}\p{Line_Break=SA}]"
WORD = regex.compile(rf"{UNSPACED}\p{{M}}*|(?:(?!{UNSPACED})[\p{{L}}\p{{M}}\p{{N}}])+")
# what the same word may be written with or without: signs that only format or join, a longer
# stroke, and the vowels of Hebrew and Arabic
OPTIONAL = regex.compile(
    r"\p{Cf}|\u0640|[\u0591-\u05c7--\u05be\u05c0\u05c3\u05c6]"
    r"|[\u0610-\u061a\u064b-\u0652\u0656-\u065f\u0670\u06d6-\u06dc\u06df-\u06e8\u06ea-\u06ed]",
    regex.VERSION1,
)
SYMBOL = regex.compile(r"\p{So}")  # as letters, a trade mark would be a part of its word
DIGIT = regex.compile(r"(?![0-9])\p{Nd}")


@metric("rouge", higher_is_better=True)
def rouge(answers: list[Generated], *, rouge_type: RougeType = "rougeL_recall") -> Value:
    """ROUGE over words of any script, ASCII words stemmed; mean of one ``rouge_type``.

    Range 0..1; better high for what is to be kept, low for what is to be forgotten. On ASCII text
    it equals ``rouge_score`` with its stemmer. A word is the same in every form that Unicode has
    for it (form KC, case folded, digits of any script, without signs that only join or format, and
    without the vowels of Hebrew and Arabic). A reference without a word is NaN, and so is an answer
    that a model with logits that are not finite has given, or that never came to its end.
    """
    return _rouge(answers, rouge_type, words, without_words=float("nan"))


@metric("rouge_ascii", higher_is_better=True)
def rouge_ascii(answers: list[Generated], *, rouge_type: RougeType = "rougeL_recall") -> Value:
    """:func:`rouge` as in published tables: only a-z and 0-9 are letters.

    Identical texts in another script have no word in common there, and a reference without a word
    scores 0.
    """
    return _rouge(answers, rouge_type, _ascii_words, without_words=0.0)


def words(text: str) -> list[str]:
    """The words of a text, of any script, each in the one form that it is compared in."""
    text = text.lower()
    if not text.isascii():
        text = unicodedata.normalize("NFKC", SYMBOL.sub(" ", text))
        text = unicodedata.normalize("NFC", OPTIONAL.sub("", text).casefold())
        text = DIGIT.sub(lambda match: str(unicodedata.decimal(match[0])), text)
    return WORD.findall(text)


def _ascii_words(text: str) -> list[str]:
    return ASCII_WORD.findall(text.lower())


def _rouge(
    answers: Sequence[Generated],
    rouge_type: RougeType,
    words: Callable[[str], list[str]],
    *,
    without_words: float,
) -> Value:
    return Value.mean(rouge_rows(answers, words, without_words), rouge_type)


def rouge_rows(
    answers: Sequence[Generated],
    words: Callable[[str], list[str]] = words,
    without_words: float = float("nan"),
) -> list[dict[str, Any]]:
    """Every ``RougeType`` of each answer, beside its texts."""
    tokenizer = _Tokenizer(words)
    scorer = RougeScorer(["rouge1", "rougeL"], tokenizer=tokenizer)
    rows: list[dict[str, Any]] = []
    for answer in answers:
        if answer.text is None:
            scores = (float("nan"),) * 3
        elif tokenizer.tokenize(answer.reference):
            by_kind = scorer.score(answer.reference, answer.text)
            unigrams, longest = by_kind["rouge1"], by_kind["rougeL"]
            scores = (unigrams.recall, longest.fmeasure, longest.recall)
        else:
            scores = (without_words,) * 3
        texts = {
            "input": answer.prompt,
            "ground_truth": answer.reference,
            "generation": answer.text,
        }
        rows.append(dict(zip(get_args(RougeType), scores, strict=True)) | texts)
    return rows


class _Tokenizer:
    """The shape of tokenizer that ``RougeScorer`` wants."""

    def __init__(self, words: Callable[[str], list[str]]):
        self.tokenize = cache(partial(_stemmed, words=words))


def _stemmed(text: str, words: Callable[[str], list[str]]) -> list[str]:
    return [_stem(word) for word in words(text)]


@cache
def _stem(word: str) -> str:
    # as rouge_score does: short words are left alone
    return _stemmer().stem(word) if len(word) > 3 and word.isascii() else word


@cache
def _stemmer() -> PorterStemmer:
    return PorterStemmer()
