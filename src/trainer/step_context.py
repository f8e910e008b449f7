"""Gather all that the making of a training step may use."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import takewhile

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments

from unlora.data.collate import collate_parts
from unlora.data.pairs import Parts
from unlora.trainer.loss import UnlearningLoss
from unlora.trainer.method_state import MethodState
from unlora.trainer.running_means import RunningMeans
from unlora.trainer.term_losses import TermLosses


@dataclass(frozen=True)
class StepContext:
    """One value that the trainer makes and hands to whoever works on a step.

    Attributes:
        model: the policy, not wrapped.
        parts: the data.
        losses: the terms' losses of a micro-batch; asks the models.
        means: numbers for the log.
        state: what the method remembers beside the weights.
        trainer_state: returns the current one.
        autocast: the context of a forward pass in mixed precision.
    """

    model: nn.Module
    parts: Parts
    pad_id: int
    args: TrainingArguments
    accelerator: Accelerator
    losses: TermLosses
    means: RunningMeans
    state: MethodState
    trainer_state: Callable[[], TrainerState]
    autocast: Callable[[], AbstractContextManager] = nullcontext

    @property
    def step_number(self) -> int:
        """The step that is being made, from 1."""
        return int(self.trainer_state().global_step) + 1

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained: name -> parameter, in the model's order."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def collate(self, rows: Sequence[Mapping[str, int]]) -> dict[str, dict[str, Tensor]]:
        """Make a batch of rows of the data, each given as part -> row number."""
        return collate_parts([self.parts[row] for row in rows], self.pad_id)


def common_beginning(parts: Parts) -> int:
    """Count the tokens with which every row of all parts begins, less than the shortest has."""
    rows = [row.input_ids for of_part in parts.rows.values() for row in of_part]
    first, last = min(rows, default=[]), max(rows, default=[])  # of all, these differ soonest
    shortest = min(map(len, rows), default=0)
    alike = (a == b for a, b in zip(first, last, strict=False))
    return min(sum(takewhile(bool, alike)), max(shortest - 1, 0))


def make_context(
    model: nn.Module,
    loss: UnlearningLoss,
    parts: Parts,
    *,
    pad_id: int,
    args: TrainingArguments,
    accelerator: Accelerator,
    trainer_state: Callable[[], TrainerState],
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    split: bool = False,
) -> StepContext:
    """Prepare a model for the steps of a loss: draw tensors, copy a reference, freeze layers.

    Args:
        split: weights are spread over processes, and whole in a forward pass only.
    """
    width = model.config.get_text_config().hidden_size
    state = MethodState.draw(loss, width=width, seed=args.seed, device=args.device)
    losses = TermLosses(
        model, loss, state, anchor=parts.anchor, args=args, accelerator=accelerator,
        trainer_state=trainer_state, split=split, common=common_beginning(parts),
    )  # fmt: skip
    return StepContext(
        model, parts, pad_id, args, accelerator, losses, RunningMeans(), state, trainer_state,
        autocast,
    )  # fmt: skip
