"""Micro-batches that do not fit into memory; and what a run holds, as a copy to go back to."""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import DistributedType
from torch import Tensor

from unlora.errors import InputError, is_out_of_memory

if TYPE_CHECKING:
    from unlora.trainer.trainer import UnlearningTrainer

Batch = Mapping[str, Mapping[str, Tensor]]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Copy:
    """Trained weights, optimiser and what the objective remembers, in main memory."""

    weights: Mapping[str, Tensor]
    optimiser: Any
    remembered: Mapping[str, Tensor]

    @classmethod
    def of(cls, trainer: "UnlearningTrainer") -> "Copy":
        weights = {n: p.detach().to("cpu", copy=True) for n, p in _trained(trainer).items()}
        optimiser = _to_cpu(trainer.optimizer.state_dict())
        return cls(weights, optimiser, {n: t.clone() for n, t in trainer.remembered().items()})

    def restore(self, trainer: "UnlearningTrainer") -> None:
        """Put everything back; the learning rates stay those of the schedule."""
        with torch.no_grad():
            for name, parameter in _trained(trainer).items():
                parameter.copy_(self.weights[name])
        optimiser = trainer.optimizer
        rates = [group["lr"] for group in optimiser.param_groups]
        optimiser.load_state_dict(copy.deepcopy(self.optimiser))
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate
        trainer.recall(self.remembered)


class Pieces:
    """Micro-batches in as many pieces as memory needs, from when it runs out to the end of the run.

    A step in which it runs out is made again from its beginning, from the same random state. As the
    loss is a mean over the effective batch, the gradient does not depend on the pieces.

    Attributes:
        number: into how many pieces each micro-batch is split.
        now: how many pieces the micro-batch has that is at work.
    """

    def __init__(self, trainer: "UnlearningTrainer"):
        self.trainer = trainer
        self.number = self.now = 1
        self.facts: dict[str, int] = {}  # for the manifest, where memory has run out
        self._random: tuple[Tensor, Tensor | None] | None = None
        self._noted: dict[str, int] = {}

    def one(self, inputs: Batch, step: Callable[[Batch], Tensor]) -> Tensor:
        """The loss of a micro-batch, its gradient added up.

        Args:
            step: the same for a piece of it.
        """
        before = self.trainer.micro_batches
        place = next(i for i, batch in enumerate(before) if batch is inputs)
        if place == 0:
            self._begin()
        found = self._tried(partial(self._summed, inputs, step))
        while found is None:
            self._halve(before)
            for batch in before[: place + 1]:  # the failed pass may have left a part of a gradient
                found = self._tried(partial(self._summed, batch, step))
                if found is None:
                    break
        return found

    def all(self, step: Callable[[Sequence[Batch]], Tensor]) -> Tensor:
        """The loss of all micro-batches of a step whose gradients are composed."""
        before = self.trainer.micro_batches
        self._begin()
        while (found := self._tried(lambda: step(self._split_all(before)))) is None:
            self.trainer.composed.undo()  # type: ignore[union-attr]
            self._halve(before)
        return found

    def _begin(self) -> None:
        device = self.trainer.args.device
        of_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._random = torch.get_rng_state(), of_device
        self._noted = self.trainer.num_noted()

    def _summed(self, batch: Batch, step: Callable[[Batch], Tensor]) -> Tensor:
        pieces = self._split(batch)
        self.now, before = len(pieces), self.trainer.num_noted()
        losses = [step(piece) for piece in pieces]
        self.now = 1
        self.trainer.add_up_notes(before)
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]

    def _split(self, batch: Batch) -> list[Batch]:
        numbers = {part: one["number"].tolist() for part, one in batch.items()}
        rows = len(next(iter(numbers.values())))
        if min(self.number, rows) == 1:
            return [batch]
        items = [
            self.trainer.parts[{part: numbers[part][i] for part in numbers}] for i in range(rows)
        ]
        size = -(-rows // self.number)
        return [self.trainer.data_collator(items[i : i + size]) for i in range(0, rows, size)]

    def _split_all(self, batches: Sequence[Batch]) -> list[Batch]:
        pieces = [piece for batch in batches for piece in self._split(batch)]
        return [self.trainer._prepare_inputs(piece) for piece in pieces]

    def _tried(self, attempt: Callable[[], Any]) -> Any:
        """What an attempt gives; None where memory ran out."""
        try:
            return attempt()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if self.trainer.accelerator.distributed_type != DistributedType.NO:
                raise InputError(
                    f"Memory ran out in one of several processes at step {self._step}. Set "
                    "trainer.args.per_device_train_batch_size to half, and "
                    "trainer.args.gradient_accumulation_steps to twice what they are; "
                    "trainer.args.resume_from_checkpoint=auto goes on from the last checkpoint."
                ) from error
        return None  # here, and not in the except clause, the tensors of the failed pass are free

    def _halve(self, batches: Sequence[Batch]) -> None:
        """Half the rows at once from here on, and the step from its beginning."""
        most = max(len(part["number"]) for batch in batches for part in batch.values())
        rows = -(-most // self.number)
        if rows == 1:
            longest = max(part["input_ids"].shape[1] for b in batches for part in b.values())
            raise InputError(
                f"Memory ran out on a single row of each part of the data, of up to {longest} "
                "tokens. Set trainer.args.gradient_checkpointing=true, max_length of the data "
                "lower, or load the model in a smaller dtype."
            )
        self.number, self.now = -(-most // (rows // 2)), 1
        self.facts = {"rows_at_once": rows // 2, "of": most, "from_step": self._step}
        logger.warning(
            "Memory ran out at step %d on %d rows; going on with %d at once, and as much more "
            "accumulation: the result is the same",
            self._step, rows, rows // 2,
        )  # fmt: skip
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        assert self._random is not None
        torch.set_rng_state(self._random[0])
        if self._random[1] is not None:
            torch.cuda.set_rng_state(self._random[1], self.trainer.args.device)
        self.trainer.model.zero_grad()
        self.trainer.forget_notes(self._noted)

    @property
    def _step(self) -> int:
        return self.trainer.state.global_step + 1


def _trained(trainer: "UnlearningTrainer") -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}


def _to_cpu(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: _to_cpu(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [_to_cpu(value) for value in state]
    return state
