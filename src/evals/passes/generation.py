"""Let a model write: greedily, or by draws that depend on nothing but a key."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from unlora.evals.passes.batching import Budget, Progress, answer_all
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
from unlora.evals.passes.decoding import decoding_of, select_rows
from unlora.evals.passes.loglikelihood import warn_of_dead
from unlora.evals.records import Generated
from unlora.forward.modes import device_of, evaluating, unwrapped

KEYS_AND_VALUES = 4.0  # a token that is only remembered needs less memory than one that is read
LOGITS_ON_CPU, LOGITS_ON_GPU = 1 << 23, 1 << 27  # of all rows of a batch; draws take more
AnswerOf = Callable[[list[int]], list[int] | None]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn where not the likeliest is wanted.

    Attributes:
        keys: of each prompt, the numbers that seed its draws: equal keys draw alike, whatever
            else is in the batch.
        temperature: the logits are divided by it.
        top_p: only the likeliest tokens that together have this probability are drawn.
    """

    keys: Sequence[Sequence[int]]
    temperature: float = 1.0
    top_p: float = 1.0


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
    batch_size: int | None = None,
    tokens: int | None = None,
    progress: Progress = lambda done: None,
) -> list[str | None]:
    """What the model writes after each prompt, up to an end token or a stop string.

    A row that has come to its end leaves the batch. None where the logits were not finite, and a
    warning counts such rows. The model's own generation settings (temperature, penalties, ...) have
    no say.

    Args:
        stop: writing may end once one of these is in the text; what comes after is not cut.
        sampling: how to draw the tokens; without it each is the likeliest.
        only_ended: None, too, where the answer does not end within ``max_new_tokens``.
        answer_of: what of the tokens written is the answer, without the thought before it; where it
            is None, the text is None, and a warning counts such rows.
        batch_size: at most these rows at a time; fewer where the vocabulary is large.
        tokens: at most these tokens at a time; None finds a number.
        progress: told the number of tokens done, those that need not be written included.
    """
    if not prompts:
        return []
    lm = unwrapped(model)
    logits = LOGITS_ON_CPU if device_of(lm).type == "cpu" else LOGITS_ON_GPU
    most = max(1, logits // lm.config.get_text_config().vocab_size)
    with evaluating(lm):
        writer = _Writer(lm, prompts, tokenizer, end_ids, max_new_tokens, stop, sampling, answer_of)
        if not writer.decoding.padding:
            most = 1
        written = answer_all(
            list(range(len(prompts))),
            [len(prompt) + max_new_tokens for prompt in prompts],
            writer.write,
            lm,
            budget=Budget(tokens, min(batch_size or most, most)),
            share=KEYS_AND_VALUES,
            progress=lambda rows: progress(sum(len(prompts[i]) + max_new_tokens for i in rows)),
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


def _warn_of_thoughts(without_end: int, total: int, most: int) -> None:
    if without_end:
        logger.warning(
            "%d of %d answers were still in their thought after %d tokens and have no text. Set "
            "max_new_tokens higher, or chat_template_kwargs.enable_thinking=false",
            without_end, total, most,
        )  # fmt: skip


@dataclass
class _Written:
    """One row: its tokens so far, None once the model is dead on it, and whether it has ended."""

    tokens: list[int] | None
    ended: bool = False


class _Writer:
    """Writes after some of the prompts at a time."""

    def __init__(
        self,
        lm: Any,
        prompts: Sequence[Sequence[int]],
        tokenizer: PreTrainedTokenizerBase,
        end_ids: Sequence[int],
        steps: int,
        stop: Sequence[str],
        sampling: Sampling | None,
        answer_of: AnswerOf,
    ):
        self.answer_of = answer_of
        self.lm, self.prompts, self.tokenizer = lm, prompts, tokenizer
        self.ends, self.steps, self.stop, self.sampling = set(end_ids), steps, stop, sampling
        self.decoding = decoding_of(lm, tokenizer.pad_token_id)

    def write(self, batch: list[int]) -> list[_Written]:
        """What is written after these prompts."""
        width = max(len(self.prompts[i]) for i in batch)
        gaps = [width - len(self.prompts[i]) for i in batch]
        device = device_of(self.lm)
        pad = self.tokenizer.pad_token_id
        pairs = list(zip(batch, gaps, strict=True))
        ids = torch.tensor([[pad] * gap + list(self.prompts[i]) for i, gap in pairs], device=device)
        mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps], device=device)
        written = [_Written([]) for _ in batch]
        going = list(range(len(batch)))
        choose = _greedy if self.sampling is None else _Draw(self.sampling, batch, self.steps)
        cache = None
        for step in range(self.steps):
            logits, cache = self.decoding.next_logits(self.lm, ids, mask, cache)
            # NaN and +inf are the highest where they are; -inf is it only where all are -inf
            alive = logits.amax(-1).isfinite().tolist()
            chosen = choose(logits, going, step)
            del logits  # else they are there beside the next ones
            for k, row in enumerate(going):
                self._append(written[row], int(chosen[k]), alive[k])
            keep = [k for k, row in enumerate(going) if self._goes_on(written[row])]
            if not keep or step == self.steps - 1:
                break
            # without a cache all tokens are read again
            ids = torch.cat((ids, chosen[:, None]), dim=1) if cache is None else chosen[:, None]
            if len(keep) < len(going) and (cache is None or self.decoding.selects):
                rows_left = torch.tensor(keep, device=device)
                if cache is not None:
                    select_rows(cache, rows_left)
                ids, mask = ids[rows_left], mask[rows_left]
                going = [going[k] for k in keep]
            mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
        return written

    def _append(self, row: _Written, token: int, alive: bool) -> None:
        if row.tokens is None or row.ended:
            return
        if not alive:
            row.tokens = None
        elif token in self.ends:
            row.ended = True
        else:
            row.tokens.append(token)

    def _goes_on(self, row: _Written) -> bool:
        if row.tokens is None or row.ended:
            return False
        if not self.stop:
            return True
        answer = self.answer_of(row.tokens) or []
        text = self.tokenizer.decode(answer, clean_up_tokenization_spaces=False)
        return not any(string in text for string in self.stop)


def _greedy(
    logits: Float[Tensor, "rows vocab"], rows: list[int], step: int
) -> Int[Tensor, " rows"]:
    return logits.argmax(-1)


class _Draw:
    """In each row, the token that the next number of its key falls on."""

    def __init__(self, sampling: Sampling, batch: Sequence[int], steps: int):
        draws = [np.random.default_rng(sampling.keys[i]).random(steps) for i in batch]
        self.numbers = torch.tensor(np.array(draws), dtype=torch.float64)
        self.sampling = sampling

    def __call__(
        self, logits: Float[Tensor, "rows vocab"], rows: list[int], step: int
    ) -> Int[Tensor, " rows"]:
        # sums over a whole vocabulary; only mps knows no float64
        exact = torch.float32 if logits.device.type == "mps" else torch.float64
        p = (logits.to(exact) / self.sampling.temperature).softmax(-1)
        if self.sampling.top_p < 1:
            falling = p.sort(descending=True).values
            enough = falling.cumsum(-1) - falling < self.sampling.top_p
            p = p.where(p >= falling.where(enough, 1).amin(-1, keepdim=True), 0)
        below = p.cumsum(-1)
        number = self.numbers[rows, step].to(below)[:, None] * below[:, -1:]
        token = torch.searchsorted(below, number, right=True).clamp(max=p.shape[-1] - 1)
        return token.squeeze(-1)


def _run(model: nn.Module, inputs: Sequence[PassInput], **limits: Any) -> list[list[str | None]]:
    """Prompts that are continued to the same length and stop strings go through together."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for n, data in enumerate(inputs):
        alike.setdefault((data.max_new_tokens, *data.source.stop), []).append(n)
    results: dict[int, list[str | None]] = {}
    for (most, *stop), group in alike.items():
        prompts = [inputs[n].prompts for n in group]
        chat = inputs[group[0]].source.chat
        texts = generate(
            model, joined(prompts), chat.tokenizer,
            end_ids=inputs[group[0]].end_ids, max_new_tokens=most, stop=stop,
            answer_of=chat.without_thought, **limits,
        )  # fmt: skip
        results |= zip(group, split(texts, prompts), strict=True)
    return [results[n] for n in range(len(inputs))]


def _pack(texts: Sequence[str | None], data: PassInput) -> Arrays:
    prompts = [data.source.prompt_texts[i] for i in data.rows]
    cut = np.array(data.source.num_cut(data.rows, prompts=True))
    return {"said": text_array(texts), "asked": text_array(prompts), "cut": cut}


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
