"""Score answers by log-likelihood: the data's answers, or what the model generated."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from unlora.evals.passes.declaration import (
    Arrays,
    Pass,
    PassInput,
    joined,
    register,
    split,
    texts_of,
)
from unlora.evals.passes.loglikelihood import score
from unlora.evals.records import Reread, RootScored, Scored

COLUMNS = ("logp", "hit", "mean", "var")


def _run(model: nn.Module, inputs: Sequence[PassInput], **limits: Any) -> list[list[Scored]]:
    chat, rows = inputs[0].source.chat, [data.answers for data in inputs]
    texts = [""] * sum(map(len, rows))
    pad_id, end_id = chat.tokenizer.pad_token_id, chat.end_id
    records = score(model, joined(rows), texts, pad_id=pad_id, end_id=end_id, **limits)
    return split(records, rows)


def _pack(records: Sequence[Scored], data: PassInput) -> Arrays:
    if not records:  # an example may have no answers, and so may all of them
        return {"lengths": np.zeros(0, dtype=np.int64)} | data.facts
    columns = {
        column: np.concatenate([getattr(record, column) for record in records])
        for column in COLUMNS
    }
    return columns | {
        "lengths": np.array([len(record.logp) for record in records]),
        "ended": np.array([record.ended for record in records]),
    } | data.facts  # fmt: skip


def _unpack(arrays: Arrays, data: PassInput) -> list[Scored]:
    if not len(arrays["lengths"]):
        return []
    ends = np.cumsum(arrays["lengths"])[:-1]
    columns = [np.split(arrays[column], ends) for column in COLUMNS]
    texts = texts_of(arrays["texts"])
    return [
        Scored(logp, hit, mean, var, text, bool(ended))
        for logp, hit, mean, var, text, ended in zip(*columns, texts, arrays["ended"], strict=True)
    ]


def _unpack_each(arrays: Arrays, data: PassInput) -> list[Any]:
    records = _unpack(arrays, data)
    if not data.source.several:
        return list(records)
    return [*split(records, [data.source.answers_of(i) for i in data.rows])]


def _unpack_generated(arrays: Arrays, data: PassInput) -> list[Scored | None]:
    records = zip(_unpack(arrays, data), data.generated or (), strict=True)
    return [scored if answer.text is not None else None for scored, answer in records]


register(
    Pass(
        "score", version=1, order=1, record=list[Scored], record_each=list[list[Scored]],
        run=_run, pack=_pack, unpack=_unpack_each,
    ),
    Pass(
        "score_root", version=1, order=2, record=RootScored, model="root",
        run=_run, pack=_pack, unpack=_unpack,
    ),
    Pass(
        "reread", version=1, order=7, record=Reread, model="root", reads="prompts",
        after="generate", run=_run, pack=_pack, unpack=_unpack_generated,
    ),
)  # fmt: skip
