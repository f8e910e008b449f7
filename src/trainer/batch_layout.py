"""Decide how many rows go through a model at once, and whether it checkpoints (docs/scaling.md).

The rows of an optimiser step stay what they are: fewer at once means more accumulation.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from transformers import PretrainedConfig, TrainingArguments

from unlora.config.checks import ROWS_AT_ONCE
from unlora.config.schema import Config
from unlora.runs.machine import in_words
from unlora.trainer.arguments import CHECKPOINTING
from unlora.trainer.checkpointing import SHARE, bound, decided, is_auto
from unlora.trainer.largest_batch import Batch
from unlora.trainer.memory_estimate import Estimate

FILLED = 4096  # tokens that keep a GPU busy
CHECKPOINTING_IS = "gradient checkpointing is"
Batches = Mapping[str, Batch]


@dataclass(frozen=True)
class Layout:
    """How the rows of a step go through the model.

    Attributes:
        rows: at once, in each process.
        accumulation: micro-batches of a step.
        checkpointing: whether activations are computed again.
        why: both choices, in words.
    """

    rows: int
    accumulation: int
    checkpointing: bool
    why: str


@dataclass(frozen=True)
class Choices:
    """What may be chosen, and what is known for it.

    Attributes:
        step: rows of an optimiser step, of one process.
        batches: rows at once -> the largest micro-batch of each part.
        estimate: what a training on such batches needs.
        architecture: with it, a model that is small beside the memory is not estimated.
        available: bytes, where they are known.
        gpu: whether more rows at once are faster until a GPU is busy.
        checkpointing: None leaves it to the memory.
    """

    step: int
    batches: Callable[[int], Batches]
    estimate: Callable[[Batches], Estimate]
    architecture: PretrainedConfig | None
    available: int | None
    gpu: bool
    checkpointing: bool | None = None

    def layout(self) -> Layout:
        """The first of the layouts that fits; the smallest where none does."""
        if self.available is None:
            return self._unknown("the memory that is available is not known")
        room = int(SHARE * self.available)
        try:
            for rows, checkpointing in self._layouts():
                needed = self._needed(rows, checkpointing, room)
                if needed is None or needed <= room:
                    break
        except Exception as error:  # of an architecture that cannot be tried without weights
            return self._unknown(f"what is needed is not known ({error})")
        needs = "the model is small" if needed is None else f"about {in_words(needed)} are needed"
        why = f"{needs}, and {in_words(self.available)} are available"
        return self._layout(rows, checkpointing, why)

    def _unknown(self, why: str) -> Layout:
        rows = next(n for n in range(ROWS_AT_ONCE, 0, -1) if self.step % n == 0)
        return self._layout(rows, self.checkpointing is not False, why)

    def _layouts(self) -> Iterator[tuple[int, bool]]:
        """Rows and checkpointing, the fastest first."""
        sizes = [n for n in range(self.step, 0, -1) if self.step % n == 0]
        if not self.gpu:
            sizes = [n for n in sizes if n <= ROWS_AT_ONCE]
        if self.checkpointing is not None:
            yield from ((rows, self.checkpointing) for rows in sizes)
            return
        # a third more time for checkpointing is less than what a GPU loses on few tokens
        enough = [n for n in sizes if self.gpu and _tokens(self.batches(n)) >= FILLED]
        yield from ((rows, False) for rows in enough or sizes[:1])
        yield from ((rows, True) for rows in sizes)

    def _needed(self, rows: int, checkpointing: bool, room: int) -> int | None:
        """Bytes; None where a look at the sizes tells that they are few."""
        batches = self.batches(rows)
        if self.architecture and bound(batches, self.architecture) <= room / 4:
            return None
        return self.estimate(batches).switched(checkpointing).total_bytes

    def _layout(self, rows: int, checkpointing: bool, why: str) -> Layout:
        tokens = round(_tokens(self.batches(rows)))
        words = (
            f"{rows} of the {self.step} rows of a step at once (about {tokens:,} tokens), gradient "
            f"checkpointing {'on' if checkpointing else 'off'}: {why}"
        )
        return Layout(rows, self.step // rows, checkpointing, words)


def choose_layout(
    config: Config,
    args: TrainingArguments,
    batches: Callable[[int], Batches],
    estimate: Callable[[Batches], Estimate],
    *,
    available: int | None,
    architecture: PretrainedConfig | None = None,
) -> Layout | None:
    """The layout of a training where ``auto`` leaves it to the memory; None where nothing does.

    Args:
        batches, estimate, available, architecture: see :class:`Choices`.
    """
    auto = is_auto(config.trainer.args)
    if config.trainer.batch_is_auto and may_choose(args):
        return Choices(
            args.train_batch_size * args.gradient_accumulation_steps,
            batches,
            estimate,
            architecture,
            available,
            args.device.type == "cuda",
            None if auto else bool(getattr(args, CHECKPOINTING)),
        ).layout()
    if not auto:
        return None
    whole = batches(args.train_batch_size)
    on, why = decided(whole, architecture, partial(estimate, whole), available)
    why = f"{CHECKPOINTING_IS} {why}"
    return Layout(args.train_batch_size, args.gradient_accumulation_steps, on, why)


def may_choose(args: TrainingArguments) -> bool:
    """Whether a run may choose its rows at once.

    All processes must make as many micro-batches, and one that is not full may be dropped.
    """
    return args.world_size == 1 and not args.dataloader_drop_last


def _tokens(batches: Batches) -> float:
    """Of a micro-batch of usual rows, all parts together."""
    return sum(batch.rows * batch.mean for batch in batches.values())
