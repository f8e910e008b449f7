"""A model in memory as lm-evaluation-harness wants it, answered by our own pass."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from unlora.data.chat import Encoded
from unlora.evals.passes import score
from unlora.evals.progress import Bar
from unlora.outputs import IGNORE_INDEX


def asked_by_our_pass(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int | str | None,
    kind: str,
    bar: Bar,
    template_args: Mapping[str, Any],
) -> Any:
    """The model as lm-eval wants it, with our own pass for log-likelihoods.

    lm-eval's pass would have every process answer everything, meet the vocabulary on whole prompts
    and take its logarithms in the dtype of the weights, where close choices tie.

    Args:
        batch_size: sequences at a time; None or auto: by the token budget alone.
        kind: what the bar calls it.
        template_args: further arguments of the chat template.
    """
    from lm_eval.models.huggingface import HFLM

    with _constructing(model):
        lm: Any = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size or "auto",
            chat_template_args=dict(template_args),
        )

    def loglikelihood(requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        rows = [_row(before, choice, lm.max_length) for _, before, choice in requests]
        bar.expect(kind, sum(len(row.input_ids) for row in rows))
        records = score(
            model,
            rows,
            [""] * len(rows),
            pad_id=tokenizer.pad_token_id,
            end_id=None,
            batch_size=batch_size if isinstance(batch_size, int) else None,
            progress=lambda done: bar.done("score", done),
        )
        return [
            (float(one.logp.sum(dtype=np.float64)), bool(one.hit.all()))
            if len(one.logp)
            else (float("nan"), False)
            for one in records
        ]

    encode = lm.loglikelihood
    lm.loglikelihood = lambda requests, **_: encode(requests, disable_tqdm=True)
    lm._loglikelihood_tokens = loglikelihood
    return lm


def _row(before: list[int], choice: list[int], most: int) -> Encoded:
    """A choice after its question, the question cut on the left to what the model can read."""
    ids = [*before, *choice][-(most + 1) :]  # the last token is predicted, not read
    start = max(1, len(ids) - len(choice))
    return Encoded(ids, [IGNORE_INDEX] * start + ids[start:])


@contextmanager
def _constructing(model: Any) -> Iterator[None]:
    """lm-eval ties weights anew, which an adapter on a tied head does not survive, and warns that
    a model which is there already is not one it loads itself."""
    model.tie_weights = lambda *args, **kwargs: None
    try:
        with quiet("lm_eval.models.huggingface", logging.ERROR):
            yield
    finally:
        del model.tie_weights


@contextmanager
def quiet(name: str, level: int) -> Iterator[None]:
    """A logger says nothing below this level."""
    chatter = logging.getLogger(name)
    before = chatter.level
    chatter.setLevel(level)
    try:
        yield
    finally:
        chatter.setLevel(before)
