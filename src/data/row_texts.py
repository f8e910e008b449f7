"""Cut rows into the texts by which they are known again.

A question with its answer is one text, and so is every answer of a conversation with the question
before it. Of running text it is every sentence; one that is long is cut behind words that its own
letters choose, so that a passage is cut alike wherever it begins.
"""

import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from unlora.data.chat_encoding import Example
from unlora.data.conversations import as_questions
from unlora.data.qa import read_pairs, text_of
from unlora.data.template import Turns
from unlora.errors import InputError

SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+|\n+")
LONG, FEW = 60, 5  # words
EVERY = 16  # words of a piece, on average
NUMBER = "\0number"  # a column that no file has
RowText = tuple[str, str]


def row_texts(
    rows: Sequence[Mapping[str, Any]], question_key: str, answer_key: str, text_key: str
) -> list[list[RowText]]:
    """The texts of each row, as (question, answer), or ("", text) of running text.

    Raises:
        InputError: a row has none of the columns, or what is in them is no text.
    """
    numbered = [{**row, NUMBER: number} for number, row in enumerate(rows)]
    questions = as_questions(numbered, question_key, answer_key)
    texts: list[list[RowText]] = [[] for _ in rows]
    if not any(question_key in row for row in questions) and any(text_key in row for row in rows):
        for number, row in enumerate(rows):
            if text_key not in row:
                raise InputError(f"Row {number} has no column {text_key!r}. Leave it out.")
            texts[number] = text_pieces(text_of(row[text_key], text_key, number))
        return texts
    for row in questions:
        number = row.pop(NUMBER)
        if question_key not in row or answer_key not in row:
            raise InputError(
                f"Row {number} has no question and answer in columns {question_key!r} and "
                f"{answer_key!r}, and no text in column {text_key!r}; it has: {', '.join(row)}. "
                "Say in which columns they are."
            )
        texts[number] += pair_texts(read_pairs([row], question_key, answer_key))
    return texts


def pair_texts(pairs: Iterable[Example]) -> list[RowText]:
    """Questions and answers, without what was said before."""
    return [(q.question if isinstance(q, Turns) else q, answer) for q, answer in pairs]


def text_pieces(text: str) -> list[RowText]:
    """The sentences of a running text, but for very short ones beside longer ones."""
    pieces = [piece for sentence in SENTENCE_END.split(text) for piece in _cut(sentence.split())]
    long = [piece for piece in pieces if len(piece) >= FEW]
    return [("", " ".join(piece)) for piece in long or [text.split()]]


def _cut(words: list[str]) -> list[list[str]]:
    if len(words) <= LONG:
        return [words]
    pieces: list[list[str]] = [[]]
    for word in words:
        pieces[-1].append(word)
        letters = "".join(filter(str.isalnum, word.casefold()))
        if zlib.crc32(letters.encode("utf-8", "surrogatepass")) % EVERY == 0:
            pieces.append([])
    return pieces
