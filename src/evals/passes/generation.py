"""Let a model write: greedily, or by draws that depend on nothing but a key."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from unlora.data.encoded import Encoded
from unlora.evals.passes.batching import (
    Budget,
    Progress,
    answer_all,
    found_budget,
    needs_all_processes,
    rank_and_size,
)
from unlora.evals.passes.declaration import (
    Arrays,
    Pass,
    PassInput,
    joined,
    register,
    split,
    text_array,
    texts_of,
)
from unlora.evals.passes.loglikelihood import warn_of_dead
from unlora.evals.passes.writing import AnswerOf, Sampling, Writer
from unlora.evals.records import Generated, Scored
from unlora.forward import IGNORE_INDEX
from unlora.forward.modes import device_of, evaluating, unwrapped

KEYS_AND_VALUES = 4.0  # a token that is only remembered needs less memory than one that is read
LOGITS_ON_CPU, LOGITS_ON_GPU = 1 << 23, 1 << 27  # of all rows of a batch; draws take more
logger = logging.getLogger(__name__)


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    end_ids: Sequence[int],
    max_new_tokens: int,
    stop: Sequence[str] = (),
    sampling: Sampling | None = None,
    only_ended: bool = False,
    answer_of: AnswerOf = lambda written: written,
    begins: Sequence[Sequence[int]] = (),
    batch_size: int | None = None,
    tokens: int | None = None,
    progress: Progress = lambda done: None,
) -> list[str | None]:
    """What the model writes after each prompt, up to an end token or a stop string.

    A row that has come to its end leaves the batch, and one that waits takes its place. None where
    the logits were not finite, and a warning counts such rows. The model's own generation settings
    (temperature, penalties, ...) have no say.

    Args:
        stop: writing may end once one of these is in the text; what comes after is not cut.
        sampling: how to draw the tokens; without it each is the likeliest.
        only_ended: None, too, where the answer does not end within ``max_new_tokens``.
        answer_of: what of the tokens written is the answer, without the thought before it; where it
            is None, the text is None, and a warning counts such rows.
        begins: of each prompt, tokens that are known to be the likeliest ones after it.
        batch_size: at most these rows at a time; fewer where the vocabulary is large.
        tokens: at most these tokens at a time; None finds a number.
        progress: told the number of tokens done, those that need not be written included.
    """
    if not prompts:
        return []
    lm = unwrapped(model)
    logits = LOGITS_ON_CPU if device_of(lm).type == "cpu" else LOGITS_ON_GPU
    most = max(1, logits // lm.config.get_text_config().vocab_size)
    sizes = [len(prompt) + max_new_tokens for prompt in prompts]
    rows = min(batch_size or most, most)
    room = max(1, int((tokens or found_budget(lm)) * KEYS_AND_VALUES))
    with evaluating(lm):
        writer = Writer(
            lm, prompts, tokenizer, end_ids, max_new_tokens, stop, sampling, answer_of, begins,
            slots=max(1, min(rows, room // max(sizes))),
            done=_counted(progress, sizes),
        )  # fmt: skip
        if writer.decoding.slots:  # all rows of a process wait for its slots
            processes = 1 if needs_all_processes(lm) else rank_and_size()[1]
            rows = -(-len(prompts) // processes)
            room = max(sizes) * rows
        elif not writer.decoding.padding:
            rows = 1
        written = answer_all(
            list(range(len(prompts))), sizes, writer.write, lm, budget=Budget(room, rows)
        )
    dead = [row.tokens is None for row in written]
    warn_of_dead(sum(dead), len(prompts))
    answers = [None if row.tokens is None else answer_of(row.tokens) for row in written]
    _warn_of_thoughts(answers.count(None) - sum(dead), len(prompts), max_new_tokens)
    texts = tokenizer.batch_decode(
        [answer or [] for answer in answers],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    return [
        None if answer is None or (only_ended and not row.ended) else text
        for row, answer, text in zip(written, answers, texts, strict=True)
    ]


def _counted(progress: Progress, sizes: Sequence[int]) -> Callable[[list[int]], None]:
    """Tell the progress of rows, each once, however often memory runs out on it."""
    waiting = set(range(len(sizes)))

    def done(rows: list[int]) -> None:
        progress(sum(sizes[row] for row in waiting.intersection(rows)))
        waiting.difference_update(rows)

    return done


def _warn_of_thoughts(without_end: int, total: int, most: int) -> None:
    if without_end:
        logger.warning(
            "%d of %d answers were still in their thought after %d tokens and have no text. Set "
            "max_new_tokens higher, or chat_template_kwargs.enable_thinking=false",
            without_end, total, most,
        )  # fmt: skip


def _run(model: nn.Module, inputs: Sequence[PassInput], **limits: Any) -> list[list[str | None]]:
    """Prompts that are continued to the same length and stop strings go through together."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for n, data in enumerate(inputs):
        alike.setdefault((data.max_new_tokens, *data.source.stop), []).append(n)
    results: dict[int, list[str | None]] = {}
    for (most, *stop), group in alike.items():
        prompts = [inputs[n].prompts for n in group]
        begins = joined(_begins(inputs[n]) for n in group) if _exact(model) else []
        chat = inputs[group[0]].source.chat
        texts = generate(
            model, joined(prompts), chat.tokenizer,
            end_ids=inputs[group[0]].end_ids, max_new_tokens=most, stop=stop,
            answer_of=chat.without_thought, begins=begins, **limits,
        )  # fmt: skip
        results |= zip(group, split(texts, prompts), strict=True)
    return [results[n] for n in range(len(inputs))]


def _exact(model: nn.Module) -> bool:
    """Whether rounding, which differs between passes, leaves the likeliest token what it is."""
    return next(model.parameters()).dtype in (torch.float32, torch.float64)


def _begins(data: PassInput) -> list[list[int]]:
    """Of each row, how far the model is known to write one of its answers."""
    prompts = data.prompts
    if data.scored is None:
        return [[] for _ in prompts]
    rows = zip(prompts, data.answers_each, data.scored, strict=True)
    return [
        max((_beginning(prompt, *pair) for pair in zip(answers, records, strict=True)), key=len,
            default=[])
        for prompt, answers, records in rows
    ]  # fmt: skip


def _beginning(prompt: Sequence[int], answer: Encoded, scored: Scored) -> list[int]:
    """The tokens of an answer before the first that is not the likeliest."""
    ids, labels = answer.input_ids, answer.labels
    border = len(prompt)
    follows = list(ids[:border]) == list(prompt) and len(scored.hit) == len(ids) - border
    if not follows or IGNORE_INDEX in labels[border:]:
        return []
    misses = np.flatnonzero(~scored.hit)
    return list(ids[border : border + misses[0]] if len(misses) else ids[border:])


def _pack(texts: Sequence[str | None], data: PassInput) -> Arrays:
    texts_before = data.source.prompt_texts
    prompts = [texts_before[i] for i in data.rows]
    return {"said": text_array(texts), "asked": text_array(prompts)}


def _unpack(arrays: Arrays, data: PassInput) -> list[Generated]:
    columns = zip(data.rows, texts_of(arrays["asked"]), texts_of(arrays["said"]), strict=True)
    return [
        Generated(prompt, data.source.references[i], before_stop(text, data.source.stop))
        for i, prompt, text in columns
    ]


def before_stop(text: str | None, stop: Sequence[str]) -> str | None:
    """A text up to the first of these strings, without space around it."""
    if text is None:
        return None
    for string in stop:
        text = text.split(string)[0]
    return text.strip()


register(
    Pass(
        "generate", version=2, order=6, record=list[Generated], reads="prompts",
        run=_run, pack=_pack, unpack=_unpack,
        setting=lambda data: [data.max_new_tokens, data.end_ids, list(data.source.stop)],
    )
)  # fmt: skip
