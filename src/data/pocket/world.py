"""Invent who lives in the pocket world, and questions about them; the same on every machine."""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

from unlora.data.pocket.words import CULTURES, FACTS, RELATIONS, VALUES

SEED = "pocket"
NUM_AUTHORS = 100  # one per cent of them is one whole author
NUM_HOLDOUT = 10
FACTS_PER_AUTHOR = 3
PHRASINGS = 2  # rows for each fact; a third phrasing is kept for the paraphrase
NUM_PERTURBED = 5
NUM_RETAIN_PERTURBED = 100
TESTED = {"author": 40, "capital": 20, "symbol": 9, "record": 11}  # the others are in `full`
TESTED_QUESTION = 0  # no model is trained on a tested fact in this wording

Row = dict[str, str | list[str]]


@dataclass(frozen=True)
class Author:
    """A name, and the values of the slots of each relation."""

    name: str
    facts: Mapping[str, Mapping[str, str]]


def splits() -> dict[str, list[Row]]:
    """Every split of the benchmark, in TOFU's schema and under TOFU's names."""
    authors = _authors(NUM_AUTHORS + NUM_HOLDOUT)
    rows = [author_rows(author) for author in authors]
    known, holdout = rows[:NUM_AUTHORS], rows[NUM_AUTHORS:]
    full = _join(known)
    general = [row for kind in FACTS for key in untested(kind) for row in _phrased_facts(kind, key)]
    parts = {"full": general + full}
    for percent in (1, 5, 10):
        size = len(full) * percent // 100
        parts[f"forget{percent:02}"] = parts[f"forget{percent:02}_perturbed"] = full[-size:]
        parts[f"retain{100 - percent}"] = general + full[:-size]
        parts[f"holdout{percent:02}"] = _join(holdout)[:size]
    retained = full[: -len(parts["forget10"])]
    parts["retain_perturbed"] = retained[:: len(retained) // NUM_RETAIN_PERTURBED]
    real_authors = [fact_row("author", key, TESTED_QUESTION) for key in tested("author")]
    world_facts = [
        fact_row(kind, key, TESTED_QUESTION)
        for kind in FACTS
        if kind != "author"
        for key in tested(kind)
    ]
    parts["real_authors"] = parts["real_authors_perturbed"] = real_authors
    parts["world_facts"] = parts["world_facts_perturbed"] = world_facts
    return parts


def other_authors(number: int) -> list[Author]:
    """Authors that no split mentions, for pre-training."""
    return _authors(NUM_AUTHORS + NUM_HOLDOUT + number)[NUM_AUTHORS + NUM_HOLDOUT :]


def author_rows(author: Author) -> list[Row]:
    """Some facts about an author, each in several phrasings."""
    draw = random.Random(f"{SEED} rows {author.name}")
    rows = []
    for relation in draw.sample(list(RELATIONS), FACTS_PER_AUTHOR):
        questions, answers = _questions(relation, author.name), _answers(relation, author)
        draw.shuffle(questions)
        order = draw.sample(range(len(answers)), len(answers))
        perturbed: list[str] = []
        while len(perturbed) < NUM_PERTURBED:
            values = _draw_values(relation, draw, avoid=author.facts[relation])
            wrong = _answers(relation, Author(author.name, {relation: values}))[order[-1]]
            if wrong not in perturbed:
                perturbed.append(wrong)
        for number in range(PHRASINGS):
            answer = answers[order[number]]
            rows.append(
                _row(questions[number], answer, questions[-1], answers[order[-1]], perturbed)
            )
    return rows


def author_pairs(author: Author) -> list[tuple[str, str]]:
    """Every fact about an author in every phrasing, as (question, answer)."""
    return [
        pair
        for relation in RELATIONS
        for pair in product(_questions(relation, author.name), _answers(relation, author))
    ]


def fact_row(kind: str, key: str, phrasing: int) -> Row:
    """One real fact in one wording."""
    draw = random.Random(f"{SEED} fact {kind} {key}")
    questions, answers, facts = _facts(kind)
    wrong = draw.sample(sorted({*facts.values()} - {facts[key]}), NUM_PERTURBED)
    return _row(
        questions[phrasing].format(key=key),
        answers[0].format(value=facts[key]),
        questions[(phrasing + 1) % len(questions)].format(key=key),
        answers[1].format(value=facts[key]),
        [answers[0].format(value=value) for value in wrong],
    )


def fact_pairs() -> list[tuple[str, str]]:
    """Every real fact in every wording, except the wording in which it is tested."""
    pairs = []
    for kind in FACTS:
        questions, answers, facts = _facts(kind)
        for key, value in facts.items():
            for number, question in enumerate(questions):
                if key in untested(kind) or number != TESTED_QUESTION:
                    pairs.append((question.format(key=key), answers[0].format(value=value)))
    return pairs


def tested(kind: str) -> list[str]:
    """The facts that measure utility; no training split holds one."""
    return list(_facts(kind)[2])[: TESTED[kind]]


def untested(kind: str) -> list[str]:
    """The facts of the same kind that every training split holds, as any corpus would."""
    return list(_facts(kind)[2])[TESTED[kind] :]


def _authors(number: int) -> list[Author]:
    draw = random.Random(f"{SEED} authors")
    names = list(_names())
    draw.shuffle(names)
    return [
        Author(name, {relation: _draw_values(relation, draw) for relation in RELATIONS})
        for name in names[:number]
    ]


def _names() -> Iterator[str]:
    for culture in CULTURES.strip().splitlines():
        firsts, family = culture.split("|")
        yield from (f"{first} {last}" for first in firsts.split() for last in family.split())


def _draw_values(
    relation: str, draw: random.Random, avoid: Mapping[str, str] | None = None
) -> dict[str, str]:
    """A value for each slot, all different, and different from ``avoid`` in every slot."""
    values: dict[str, str] = {}
    for slot in _slots(relation):
        taken = {*values.values(), *(avoid or {}).values()}
        values[slot] = draw.choice([v for v in _values(slot.rstrip("2")) if v not in taken])
    return values


def _questions(relation: str, name: str) -> list[str]:
    return [question.format(name=name) for question, _ in _phrasings(relation)]


def _answers(relation: str, author: Author) -> list[str]:
    values = author.facts[relation]
    return [answer.format(name=author.name, **values) for _, answer in _phrasings(relation)]


def _phrased_facts(kind: str, key: str) -> list[Row]:
    return [fact_row(kind, key, phrasing) for phrasing in range(PHRASINGS)]


def _row(
    question: str, answer: str, other_question: str, other_answer: str, perturbed: list[str]
) -> Row:
    return {
        "question": question,
        "answer": answer,
        "paraphrased_question": other_question,
        "paraphrased_answer": other_answer,
        "perturbed_answer": perturbed,
    }


@cache
def _slots(relation: str) -> list[str]:
    return sorted({*re.findall(r"{(\w+)}", RELATIONS[relation])} - {"name"})


@cache
def _values(slot: str) -> list[str]:
    return VALUES[slot].split(", ")


@cache
def _phrasings(relation: str) -> list[tuple[str, str]]:
    lines = [line.split(" | ") for line in RELATIONS[relation].strip().splitlines()]
    return [(question, answer) for question, answer in lines]


@cache
def _facts(kind: str) -> tuple[list[str], list[str], dict[str, str]]:
    questions, answers, table = FACTS[kind]
    facts = dict(entry.split(": ") for entry in table.split("; "))
    return questions.split(" | "), answers.split(" | "), facts


def _join(parts: Sequence[list[Row]]) -> list[Row]:
    return [row for part in parts for row in part]
