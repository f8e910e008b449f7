"""Write some prompts on, token by token: which rows go together, and who leaves when."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unlora.evals.passes.decoding import decoding_of, select_rows
from unlora.evals.passes.slot_cache import SlotCache
from unlora.forward.modes import device_of

AnswerOf = Callable[[list[int]], list[int] | None]
FREE = 1 / 8  # of the slots, before rows that wait are read together


class Choose(Protocol):
    """Pick a token for each of some rows that have so many."""

    def __call__(
        self, logits: Float[Tensor, "rows vocab"], rows: list[int], steps: list[int]
    ) -> Int[Tensor, " rows"]: ...


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


@dataclass
class Written:
    """One row: its tokens so far, None once the model is dead on it, and whether it has ended."""

    tokens: list[int] | None = field(default_factory=list)
    ended: bool = False


@dataclass
class Writer:
    """Writes after some of the prompts at a time.

    Attributes:
        begins: of each prompt, tokens that are known to be the likeliest ones.
        slots: rows at a time, where the model's keys and values go into slots.
        done: told the prompts that have ended.
    """

    lm: Any
    prompts: Sequence[Sequence[int]]
    tokenizer: PreTrainedTokenizerBase
    end_ids: Sequence[int]
    steps: int
    stop: Sequence[str]
    sampling: Sampling | None
    answer_of: AnswerOf
    begins: Sequence[Sequence[int]]
    slots: int
    done: Callable[[list[int]], Any]

    def __post_init__(self) -> None:
        self.decoding = decoding_of(self.lm, self.tokenizer.pad_token_id)
        self.ends = set(self.end_ids)

    def write(self, batch: list[int]) -> list[Written]:
        """What is written after these prompts."""
        choose: Choose = (
            _greedy if self.sampling is None else _Draw(self.sampling, batch, self.steps)
        )
        if self.decoding.slots:
            return self._in_slots(batch, choose)
        return self._together(batch, choose)

    def _in_slots(self, batch: list[int], choose: Choose) -> list[Written]:
        """Rows that wait take the slots of those that have ended."""
        written = [self._begun(i) for i in batch]
        waiting = deque(row for row, begun in enumerate(written) if self._goes_on(begun))
        self.done([i for i, begun in zip(batch, written, strict=True) if not self._goes_on(begun)])
        count = min(self.slots, len(waiting))
        longest = max((len(self.prompts[i]) for i in batch), default=0)
        cache = SlotCache(count, longest + self.steps)
        going: list[int] = []
        while waiting or going:
            free = count - len(going)
            if waiting and (not going or free >= FREE * count):
                new = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                texts = [[*self.prompts[batch[row]], *(written[row].tokens or [])] for row in new]
                pad_id = self.tokenizer.pad_token_id
                logits = self.decoding.read_prompts(self.lm, texts, pad_id, cache)
                going += new
            else:
                new = going
                tokens = [(written[row].tokens or [])[-1] for row in going]
                logits = self.decoding.next_in_slots(self.lm, tokens, cache)
            self._append(written, new, logits, choose)
            del logits  # else they are there beside the next ones
            staying = [k for k, row in enumerate(going) if self._goes_on(written[row])]
            if len(staying) < len(going):
                self.done([batch[row] for row in going if not self._goes_on(written[row])])
                going = [going[k] for k in cache.keep(staying)]
        return written

    def _begun(self, prompt: int) -> Written:
        """A row with the tokens that are known."""
        row = Written()
        for token in self.begins[prompt] if self.begins else ():
            if not self._goes_on(row):
                break
            row.ended = token in self.ends
            if not row.ended and row.tokens is not None:
                row.tokens.append(token)
        return row

    def _together(self, batch: list[int], choose: Choose) -> list[Written]:
        """All rows are read at once, padded on the left; those that have ended leave."""
        width = max(len(self.prompts[i]) for i in batch)
        gaps = [width - len(self.prompts[i]) for i in batch]
        device = device_of(self.lm)
        pad = self.tokenizer.pad_token_id
        pairs = list(zip(batch, gaps, strict=True))
        ids = torch.tensor([[pad] * gap + list(self.prompts[i]) for i, gap in pairs], device=device)
        mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps], device=device)
        written = [Written() for _ in batch]
        going = list(range(len(batch)))
        cache = None
        for step in range(self.steps):
            logits, cache = self.decoding.next_logits(self.lm, ids, mask, cache)
            chosen = self._append(written, going, logits, choose)
            del logits
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
        self.done(batch)
        return written

    def _append(
        self, written: list[Written], rows: list[int], logits: Tensor, choose: Choose
    ) -> Int[Tensor, " rows"]:
        """Write the next token of these rows."""
        # NaN and +inf are the highest where they are; -inf is it only where all are -inf
        alive = logits.amax(-1).isfinite().tolist()
        chosen = choose(logits, rows, [len(written[row].tokens or []) for row in rows])
        for row, token, lives in zip(rows, chosen.tolist(), alive, strict=True):
            line = written[row]
            if line.tokens is None or line.ended:
                continue
            if not lives:
                line.tokens = None
            elif token in self.ends:
                line.ended = True
            else:
                line.tokens.append(token)
        return chosen

    def _goes_on(self, row: Written) -> bool:
        if row.tokens is None or row.ended or len(row.tokens) >= self.steps:
            return False
        if not self.stop:
            return True
        answer = self.answer_of(row.tokens) or []
        text = self.tokenizer.decode(answer, clean_up_tokenization_spaces=False)
        return not any(string in text for string in self.stop)


def _greedy(
    logits: Float[Tensor, "rows vocab"], rows: list[int], steps: list[int]
) -> Int[Tensor, " rows"]:
    return logits.argmax(-1)


class _Draw:
    """In each row, the token that the next number of its key falls on."""

    def __init__(self, sampling: Sampling, batch: Sequence[int], steps: int):
        draws = [np.random.default_rng(sampling.keys[i]).random(steps) for i in batch]
        self.numbers = torch.tensor(np.array(draws), dtype=torch.float64)
        self.sampling = sampling

    def __call__(
        self, logits: Float[Tensor, "rows vocab"], rows: list[int], steps: list[int]
    ) -> Int[Tensor, " rows"]:
        # sums over a whole vocabulary; only mps knows no float64
        exact = torch.float32 if logits.device.type == "mps" else torch.float64
        p = (logits.to(exact) / self.sampling.temperature).softmax(-1)
        if self.sampling.top_p < 1:
            falling = p.sort(descending=True).values
            enough = falling.cumsum(-1) - falling < self.sampling.top_p
            p = p.where(p >= falling.where(enough, 1).amin(-1, keepdim=True), 0)
        below = p.cumsum(-1)
        number = self.numbers[rows, steps].to(below)[:, None] * below[:, -1:]
        token = torch.searchsorted(below, number, right=True).clamp(max=p.shape[-1] - 1)
        return token.squeeze(-1)
