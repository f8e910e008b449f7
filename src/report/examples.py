"""Collect what was asked and what each model answered: the page's before/after browser."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unlora.report.runs import Result, Row

LONGEST = 2000  # characters of a text that are shown; the log has the whole
MOST_TEXT = 20_000_000  # characters on a page; seeds beyond the first give way
_ORDER = ("forget", "retain", "neighbor", "holdout")
_SPLITS = {
    "forget_Q_A": "forget",
    "retain_Q_A": "retain",
    "holdout_Q_A": "holdout",
    "ra_Q_A": "real authors",
    "wf_Q_A": "world facts",
    "forget_knowmem": "forget (questions)",
    "forget_verbmem": "forget (continue the text)",
    "retain_knowmem": "retain (questions)",
    "forget_level1": "forget (cloze)",
    "forget_level2": "forget (questions)",
    "forget_level3": "forget (attacks)",
    "neighbor_level1": "neighbours (cloze)",
    "neighbor_level2": "neighbours (questions)",
}


@dataclass(frozen=True)
class Asked:
    """One row of one split.

    Attributes:
        answers: of each model, in the order of ``Answers.models``: text and ROUGE; None where it
            was not asked.
    """

    question: str
    truth: str
    answers: tuple[tuple[str, float | None] | None, ...]


@dataclass(frozen=True)
class Answers:
    """All that was asked of some runs.

    Attributes:
        splits: label -> its rows.
        shared: label -> what begins every question of the split (a chat template, examples), which
            is not part of the rows.
        note: what was left out, in words.
    """

    models: tuple[tuple[Row, Result], ...]
    splits: Mapping[str, tuple[Asked, ...]]
    shared: Mapping[str, str]
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """For the page, every text once and cut to what is shown."""
        texts: dict[str, int] = {}

        def index_of(text: str) -> int:
            return texts.setdefault(text, len(texts))

        splits = [
            {
                "label": label,
                "rows": [
                    [index_of(row.question), index_of(row.truth)]
                    + [x and [index_of(x[0]), x[1] if x[1] is None else round(x[1], 4)]
                       for x in row.answers]
                    for row in rows
                ],
            }
            for label, rows in self.splits.items()
        ]  # fmt: skip
        models = [
            {"name": row.name, "role": row.role, "seed": result.entry.seed}
            for row, result in self.models
        ]
        # [text, whole length] where it is cut
        cut = [t if len(t) <= LONGEST else [_cut(t), len(t)] for t in texts]
        return {"texts": cut, "models": models, "splits": splits}


def collect(rows: Sequence[Row], kind: str) -> Answers:
    """What was asked of all runs, by the generations that their logs keep.

    Rows are matched by question and true answer, so logs may be in another order or of another
    chat template.
    """
    models = [(row, result) for row in rows for result in row.results if kind in result.run.logs]
    models.sort(key=lambda model: model[1] is not model[0].results[0])  # stable: first seeds first
    size = 0
    fitting: list[tuple[Row, Result]] = []
    for row, result in models:
        size += sum(
            min(len(text), LONGEST)
            for entries in _generations(result, kind).values()
            for _, _, text, _ in entries
        )
        if size <= MOST_TEXT or not fitting:
            fitting.append((row, result))
    note = "" if len(fitting) == len(models) else (
        f"{len(models) - len(fitting)} of {len(models)} runs are not in this browser, which would "
        "become too large; their logs have all answers."
    )  # fmt: skip
    order = {id(row): i for i, row in enumerate(rows)}
    fitting.sort(key=lambda model: order[id(model[0])])
    generations = [_generations(result, kind) for _, result in fitting]
    names = list(dict.fromkeys(name for matched in generations for name in matched))
    names.sort(key=lambda name: next((i for i, x in enumerate(_ORDER) if name.startswith(x)), 9))
    splits, shared = {}, {}
    for name in names:
        label = _SPLITS.get(name, name.replace("_", " "))
        by_model, before = zip(
            *(_stripped(matched.get(name, [])) for matched in generations), strict=True
        )
        splits[label] = tuple(_matched(by_model))
        shared[label] = next(filter(None, before), "")
    return Answers(tuple(fitting), splits, shared, note)


def script_json(content: Any) -> str:
    """JSON that may stand inside a ``<script>`` element, whatever its texts are."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # also what a terminal obeys, and half a surrogate pair, which cannot be written as UTF-8
    acting = r"[<>&\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(acting, lambda sign: f"\\u{ord(sign[0]):04x}", text)


def _generations(result: Result, kind: str) -> dict[str, list[tuple[str, str, str, float | None]]]:
    """split -> (prompt, true answer, generation, ROUGE) of each row."""
    by_split = {}
    for metric, entry in result.run.logs[kind].items():
        if not metric.endswith("_ROUGE"):
            continue
        key = entry.averaged_key or "rougeL_recall"
        rows = [
            (str(row["input"]), str(row["ground_truth"]), str(row["generation"] or ""),
             _finite(row.get(key)))
            for row in entry.rows
            if {"input", "ground_truth", "generation"} <= row.keys()
        ]  # fmt: skip
        if rows:
            by_split[metric.removesuffix("_ROUGE")] = rows
    return by_split


def _finite(value: Any) -> float | None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9
    return float(value) if good else None


def _stripped(
    rows: Sequence[tuple[str, str, str, float | None]],
) -> tuple[list[tuple[str, str, str, float | None]], str]:
    """The rows without what begins and ends every prompt, and what begins it."""
    prompts = [row[0] for row in rows]
    if len(set(prompts)) < 2:
        return list(rows), ""
    before = os.path.commonprefix(prompts)  # noqa: RUF071 - of texts
    # whole lines or "Question: ", never the first words that questions happen to share
    before = re.match(r"(.*(\n|: ))?", before, re.DOTALL)[0]  # type: ignore[index]
    endings = [prompt[len(before) :][::-1] for prompt in prompts]
    after = os.path.commonprefix(endings)[::-1]  # noqa: RUF071
    role = next((word for word in ("assistant", "model") if after.strip().endswith(word)), "")
    begin = after.rindex(role) if role else after.find("\n")
    after = after[begin:] if begin >= 0 else ""
    stripped = [
        (prompt[len(before) : len(prompt) - len(after)].strip(), *row[1:])
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    return stripped, before.strip()


def _matched(by_model: Sequence[Sequence[tuple[str, str, str, float | None]]]) -> list[Asked]:
    matches: dict[tuple[str, str, int], list[tuple[str, float | None] | None]] = {}
    for column, rows in enumerate(by_model):
        times: dict[tuple[str, str], int] = {}
        for question, truth, text, score in rows:
            nth = times[question, truth] = times.get((question, truth), 0) + 1
            cells = matches.setdefault((question, truth, nth), [None] * len(by_model))
            cells[column] = (text, score)
    return [Asked(q, truth, tuple(answers)) for (q, truth, _), answers in matches.items()]


def _cut(text: str) -> str:
    return text[:LONGEST]
