"""Handle NaN or infinite losses and gradients: stop, skip the step, or roll back.

``trainer.on_divergence`` chooses. No NaN or infinity ever reaches the weights: every loss
is checked, and the gradient of every step before the optimiser sees it. All processes of a run
decide alike.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from unlora.data.pairs import BLANK
from unlora.errors import GuardError, InputError
from unlora.trainer.checkpoints import whole_checkpoints
from unlora.trainer.snapshot import Snapshot
from unlora.trainer.step_context import StepContext
from unlora.trainer.term_losses import Batch

MOST_IN_A_ROW = 3  # the run stops at the third step that is left out one after the other
MOST_ROLLBACKS = 3  # of a run
EVERY = 10  # steps after which the copy that a rollback goes back to is renewed
MOST_NAMED = 8  # rows of each part in a message
logger = logging.getLogger(__name__)


class Divergence(TrainerCallback):
    """Check losses and gradients, and do what the policy says where they are not finite.

    Args:
        policy: ``stop`` ends the run in words. ``skip`` leaves the step out: weights, optimiser
            and what the objective remembers stay as they were. ``rollback`` puts them back to a
            copy of up to ten steps ago, but never beyond a checkpoint: so a run that goes on from
            there does the same. Both go on with the next rows; the schedule is not moved.

    Attributes:
        batches: the micro-batches of this step, named in messages.
        left_out: the steps without an update, from 1.
        rollbacks: the steps at which the run went back, and to the state before which step.
    """

    def __init__(self, policy: str = "stop"):
        self.policy = policy
        self.batches: Sequence[Batch] = ()
        self.left_out: list[int] = []
        self.rollbacks: list[tuple[int, int]] = []
        self._reasons: list[str] = []  # why this step has failed
        self._context: StepContext | None = None
        self._undo: Callable[[], None] | None = None
        self._good: tuple[int, Snapshot] | None = None
        self._newest: tuple[int, Snapshot] | None = None

    def watch(
        self, context: StepContext, undo: Callable[[], None] | None = None, *, split: bool = False
    ) -> None:
        """Begin with a run, which reports its losses to :meth:`report`.

        Args:
            undo: puts back what a composed step has changed before the optimiser's turn.
            split: no process has the whole gradient.

        Raises:
            InputError: the policy needs whole gradients.
        """
        if self.policy != "stop" and split:
            raise InputError(
                f"trainer.on_divergence is {self.policy}, but with deepspeed or fsdp no process "
                "has the whole gradient. Set trainer.on_divergence=stop."
            )
        self._context, self._undo = context, undo

    @property
    def step_failed(self) -> bool:
        """Whether a loss or gradient of this step is not finite."""
        return bool(self._reasons)

    @property
    def facts(self) -> dict[str, Any]:
        """For the manifest: what was done, where something was."""
        facts = {"on_divergence": self.policy, "left_out": self.left_out} if self.left_out else {}
        return facts | ({"rolled_back": self.rollbacks} if self.rollbacks else {})

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a run that goes on from a checkpoint has to know."""
        steps = {"divergence.left_out": self.left_out, "divergence.rollbacks": self.rollbacks}
        return {name: torch.tensor(numbers) for name, numbers in steps.items() if numbers}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state_dict` gave."""
        none = torch.tensor([], dtype=torch.long)
        self.left_out = tensors.get("divergence.left_out", none).tolist()
        steps = tensors.get("divergence.rollbacks", none).tolist()
        self.rollbacks = [(at, before) for at, before in steps]

    def report(
        self, name: str, value: float, batches: Sequence[Batch], *, everywhere: bool = False
    ) -> None:
        """Take note of a loss that is not finite.

        Args:
            batches: the micro-batches it is from.
            everywhere: every process reports it.

        Raises:
            GuardError: the policy is to stop, and no process waits for this one.
        """
        assert self._context is not None
        self._reasons.append(f"{name} is {value}{self._describe(batches)}")
        state = self._context.accelerator.state
        deepspeed = getattr(state, "deepspeed_plugin", None) is not None
        alone = self._context.args.world_size == 1 or deepspeed
        if self.policy == "stop" and (alone or everywhere):
            self._stop()

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer,
        **kwargs: Any,
    ) -> None:
        due = self._newest is None or state.global_step % EVERY == 0
        if self.policy == "rollback" and due:
            assert self._context is not None
            snapshot = Snapshot.take(self._context.trained, optimizer, self._context.state)
            self._newest = (state.global_step + 1, snapshot)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Optimizer,
        **kwargs: Any,
    ) -> None:
        # under fp16 the loss scale is still being found, and the scaler leaves such steps out
        if (
            not self.step_failed
            and not args.fp16
            and not finite(p.grad for p in model.parameters())
        ):
            self._reasons.append(f"the gradient is not finite{self._describe(self.batches)}")
        if args.world_size > 1 and self._another_process_failed():
            self._reasons.append("another process has found that a loss is no number")
        if not self.step_failed:  # so the weights that this step began with are good
            self._good = self._newest
            return
        if self.policy == "stop":
            self._stop()
        self._leave_out(state.global_step + 1, optimizer)
        if args.fp16:  # a scaler that has seen no gradient refuses the step
            assert self._context is not None
            with suppress(RuntimeError):  # it has, where they were clipped
                self._context.accelerator.unscale_gradients()
        for parameter in model.parameters():
            parameter.grad = None  # optimisers leave out what has none

    def _leave_out(self, step: int, optimizer: Optimizer) -> None:
        """Undo what the step has changed, or roll back.

        Raises:
            GuardError: too many steps were left out, or the run has gone back too often.
        """
        context, reason = self._context, f"divergence: {self._reasons[0]}"
        assert context is not None
        self.left_out.append(step)
        if self.left_out[-MOST_IN_A_ROW:] == [*range(step - MOST_IN_A_ROW + 1, step + 1)]:
            self._stop(f" So were the {MOST_IN_A_ROW - 1} steps before.")
        if self._undo is not None:
            self._undo()
        if self.policy == "rollback" and self._good is not None:
            if len(self.rollbacks) == MOST_ROLLBACKS:
                self._stop(f" The run has gone back {MOST_ROLLBACKS} times already.")
            before, snapshot = self._good
            snapshot.restore(context.trained, optimizer, context.state)
            self._newest = self._good  # the later one may be what led here
            self.rollbacks.append((step, before))
            logger.warning("%s; going back to the state before step %d", reason, before)
        else:
            logger.warning("%s; the step is left out", reason)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._reasons = []

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._good = self._newest = None  # as where the run goes on from this checkpoint

    def _another_process_failed(self) -> bool:
        assert self._context is not None
        own = torch.tensor(float(self.step_failed), device=self._context.args.device)
        failed = bool(self._context.accelerator.reduce(own, "sum"))  # all of them must ask
        return failed and not self.step_failed

    def _describe(self, batches: Sequence[Batch]) -> str:
        """`` at step 3 (NPO), on the rows 4, 11 of forget and 2, 7 of retain``."""
        assert self._context is not None
        step, handler = self._context.step_number, self._context.losses.loss.handler
        rows: dict[str, list[int]] = {}
        for batch in batches:
            for part, collated in batch.items():
                numbers = collated["number"].tolist()
                rows.setdefault(part, []).extend(n for n in numbers if n != BLANK)
        named = [
            ", ".join(map(str, numbers[:MOST_NAMED]))
            + (f", ... ({len(numbers)} in all)" if len(numbers) > MOST_NAMED else "")
            + f" of {part}"
            for part, numbers in rows.items()
        ]
        return f" at step {step} ({handler}), on the rows {' and '.join(named)}, counted from 0"

    def _stop(self, more: str = "") -> None:
        assert self._context is not None
        whole = whole_checkpoints(Path(self._context.args.output_dir))
        where = (
            f"The last checkpoint is kept: {whole[-1]}."
            if whole
            else "There is no checkpoint: set trainer.args.save_strategy=epoch."
        )
        choice = ", or set trainer.on_divergence=skip or rollback" * (self.policy == "stop")
        raise GuardError(
            f"divergence: {self._reasons[0]}.{more} Take a lower learning rate or a bounded "
            f"objective{choice}. {where}"
        )


def finite(gradients: Iterable[Tensor | None]) -> bool:
    """Return whether all are finite; of gradients split over processes, this one's share."""
    here = [getattr(g, "to_local", lambda g=g: g)() for g in gradients if g is not None]
    if not here:
        return True
    return math.isfinite(float(nn.utils.get_total_norm(here, norm_type=math.inf)))
