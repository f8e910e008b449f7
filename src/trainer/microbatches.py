"""Halve micro-batches after an out-of-memory error and retry the step: the same gradient."""

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from accelerate import DistributedType
from accelerate.utils import send_to_device
from torch import Tensor

from unlora.errors import InputError, is_out_of_memory
from unlora.trainer.step_context import StepContext
from unlora.trainer.term_losses import Batch

logger = logging.getLogger(__name__)


class MicrobatchSplitter:
    """Run the micro-batches of a step, in as many pieces as memory needs from then on.

    A step in which memory runs out is made again from its beginning, from the same random state. As
    the loss is a mean over the effective batch, the gradient does not depend on the pieces.

    Attributes:
        batches: the micro-batches of this step.
        pieces: into how many pieces each micro-batch is split.
        pieces_now: how many pieces the micro-batch has that is running.
        facts: for the manifest, where memory has run out.
    """

    def __init__(self, context: StepContext):
        self.context = context
        self.batches: Sequence[Batch] = ()
        self.pieces = self.pieces_now = 1
        self.facts: dict[str, int] = {}
        self._next = 0  # the micro-batch that runs next
        self._random: tuple[Tensor, Tensor | None] | None = None
        self._mark: dict[str, int] = {}

    def start_step(self, batches: Sequence[Batch]) -> None:
        """Take the micro-batches of the next step."""
        self.batches, self._next = batches, 0

    @property
    def step_is_done(self) -> bool:
        """Whether every micro-batch of this step has run."""
        return self._next == len(self.batches)

    def run(self, step: Callable[[Batch], Tensor]) -> Tensor:
        """Return the loss of the next micro-batch, its gradient added up.

        Args:
            step: the same for a piece of it.
        """
        if self._next == 0:
            self._keep_random_state()
        self._next += 1
        first = self._next - 1
        while True:  # after a failure the micro-batches before are run again, too
            for batch in self.batches[first : self._next]:
                loss = self._try(partial(self._run_pieces, batch, step))
                if loss is None:
                    break
            else:
                return loss
            self._halve()
            first = 0

    def run_step(
        self, step: Callable[[Sequence[Batch]], Tensor], undo: Callable[[], None]
    ) -> Tensor | None:
        """Return the loss of all micro-batches at once; None but for the first call in a step.

        Args:
            step: the same for all pieces of all micro-batches.
            undo: puts back what an attempt that failed has changed.
        """
        self._next += 1
        if self._next > 1:
            return None
        self._keep_random_state()
        while (loss := self._try(lambda: step(self._split_all()))) is None:
            undo()
            self._halve()
        return loss

    def _keep_random_state(self) -> None:
        device = self.context.args.device
        of_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._random = torch.get_rng_state(), of_device
        self._mark = self.context.means.mark()

    def _run_pieces(self, batch: Batch, step: Callable[[Batch], Tensor]) -> Tensor:
        pieces = self._split(batch)
        self.pieces_now, mark = len(pieces), self.context.means.mark()
        losses = [step(piece) for piece in pieces]
        self.pieces_now = 1
        self.context.means.merge_since(mark)
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]

    def _split(self, batch: Batch) -> list[Batch]:
        numbers = {part: rows["number"].tolist() for part, rows in batch.items()}
        count = len(next(iter(numbers.values())))
        if min(self.pieces, count) == 1:
            return [batch]
        rows = [{part: numbers[part][i] for part in numbers} for i in range(count)]
        size = -(-count // self.pieces)
        return [self.context.collate(rows[i : i + size]) for i in range(0, count, size)]

    def _split_all(self) -> list[Batch]:
        pieces = [piece for batch in self.batches for piece in self._split(batch)]
        return [send_to_device(piece, self.context.args.device) for piece in pieces]

    def _try(self, attempt: Callable[[], Tensor]) -> Tensor | None:
        """Return the result of an attempt; None where memory ran out."""
        try:
            return attempt()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if self.context.accelerator.distributed_type != DistributedType.NO:
                raise InputError(
                    f"Memory ran out in one of several processes at step "
                    f"{self.context.step_number}. Set "
                    "trainer.args.per_device_train_batch_size to half, and "
                    "trainer.args.gradient_accumulation_steps to twice what they are; "
                    "trainer.args.resume_from_checkpoint=auto goes on from the last checkpoint."
                ) from error
        return None  # here, and not in the except clause, the tensors of the failed pass are free

    def _halve(self) -> None:
        """Halve the rows of a forward pass from here on, and begin the step again."""
        most = max(len(rows["number"]) for batch in self.batches for rows in batch.values())
        size = -(-most // self.pieces)
        if size == 1:
            widths = [rows["input_ids"].shape[1] for b in self.batches for rows in b.values()]
            raise InputError(
                "Memory ran out on a single row of each part of the data, of up to "
                f"{max(widths)} tokens. Set trainer.args.gradient_checkpointing=true, max_length "
                "of the data lower, or load the model in a smaller dtype."
            )
        self.pieces, self.pieces_now = -(-most // (size // 2)), 1
        step = self.context.step_number
        self.facts = {"rows_at_once": size // 2, "of": most, "from_step": step}
        logger.warning(
            "Memory ran out at step %d on %d rows; going on with %d at once, and as much more "
            "accumulation: the result is the same",
            step, size, size // 2,
        )  # fmt: skip
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        assert self._random is not None
        torch.set_rng_state(self._random[0])
        if self._random[1] is not None:
            torch.cuda.set_rng_state(self._random[1], self.context.args.device)
        self.context.model.zero_grad()
        self.context.means.drop_since(self._mark)
