"""A loss or a gradient that is no number: the run stops, leaves the step out, or goes back.

``trainer.on_divergence`` chooses. Nothing that is not a number ever reaches the weights: it is
looked for in every loss, and in the gradient of every step before the optimiser sees it. All
processes of a run decide alike.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from unlora.data.pairs import BLANK
from unlora.errors import GuardError, InputError
from unlora.trainer.checkpoints import whole_checkpoints
from unlora.trainer.microbatches import Copy

if TYPE_CHECKING:
    from unlora.trainer.trainer import UnlearningTrainer

MOST_IN_A_ROW = 3  # the run stops at the third step that is left out one after the other
MOST_ROLLBACKS = 3  # of a run
EVERY = 10  # steps after which the copy that a rollback goes back to is renewed
MOST_NAMED = 8  # rows of each part in a message
logger = logging.getLogger(__name__)


class StepDiverged(Exception):
    """A step that is composed of several gradients cannot be finished."""


class Divergence(TrainerCallback):
    """Looks at losses and gradients, and does what the policy says where they are no numbers.

    Args:
        policy: ``stop`` ends the run in words. ``skip`` leaves the step out: weights, optimiser
            and what the objective remembers stay as they were. ``rollback`` puts them back to a
            copy of up to ten steps ago, but never beyond a checkpoint: so a run that goes on from
            there does the same. Both go on with the next rows; the schedule is not moved.

    Attributes:
        left_out: the steps without an update, from 1.
        rollbacks: the steps at which the run went back, and to the state before which step.
    """

    def __init__(self, policy: str = "stop"):
        self.policy = policy
        self.left_out: list[int] = []
        self.rollbacks: list[tuple[int, int]] = []
        self._found: list[str] = []  # what was seen in this step
        self._trainer: UnlearningTrainer | None = None
        self._good: tuple[int, Copy] | None = None
        self._newest: tuple[int, Copy] | None = None

    def watch(self, trainer: "UnlearningTrainer") -> None:
        """Begin; ``trainer`` shows its losses with :meth:`saw`.

        Raises:
            InputError: the policy needs gradients that this trainer does not show.
        """
        hidden = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
        if self.policy != "stop" and hidden:
            raise InputError(
                f"trainer.on_divergence is {self.policy}, but with deepspeed or fsdp no process "
                "has the whole gradient. Set trainer.on_divergence=stop."
            )
        self._trainer = trainer

    @property
    def now(self) -> bool:
        """Whether this step has diverged."""
        return bool(self._found)

    @property
    def facts(self) -> dict[str, Any]:
        """For the manifest: what was done, where something was."""
        found = {"on_divergence": self.policy, "left_out": self.left_out} if self.left_out else {}
        return found | ({"rolled_back": self.rollbacks} if self.rollbacks else {})

    def remembered(self) -> dict[str, Tensor]:
        """What a run that goes on from a checkpoint has to know."""
        found = {"divergence.left_out": self.left_out, "divergence.rollbacks": self.rollbacks}
        return {name: torch.tensor(steps) for name, steps in found.items() if steps}

    def recall(self, remembered: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`remembered` gave."""
        none = torch.tensor([], dtype=torch.long)
        self.left_out = remembered.get("divergence.left_out", none).tolist()
        steps = remembered.get("divergence.rollbacks", none).tolist()
        self.rollbacks = [(at, before) for at, before in steps]

    def saw(
        self, what: str, value: float, batches: Sequence[Mapping[str, Mapping]], *, alike: bool
    ) -> None:
        """Take note of a loss that is no number.

        Args:
            batches: the micro-batches it is from.
            alike: every process has seen it.

        Raises:
            GuardError: the policy is to stop, and no process waits for this one.
            StepDiverged: the step is left out, in every process.
        """
        assert self._trainer is not None
        self._found.append(f"{what} is {value}{self._where(batches)}")
        alone = self._trainer.args.world_size == 1 or self._trainer.is_deepspeed_enabled
        if self.policy == "stop" and (alone or alike):
            self._stop()
        if alike:
            raise StepDiverged

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        due = self._newest is None or state.global_step % EVERY == 0
        if self.policy == "rollback" and due:
            assert self._trainer is not None
            self._newest = (state.global_step + 1, Copy.of(self._trainer))

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        trainer = self._trainer
        assert trainer is not None
        # under fp16 the loss scale is still being found, and the scaler leaves such steps out
        if not self.now and not args.fp16 and not finite([p.grad for p in model.parameters()]):
            self._found.append(f"the gradient is not finite{self._where(trainer.micro_batches)}")
        if args.world_size > 1 and self._elsewhere():
            self._found.append("another process has found that a loss is no number")
        if not self.now:  # so the weights that this step began with are good
            self._good = self._newest
            return
        if self.policy == "stop":
            self._stop()
        step = state.global_step + 1
        self.left_out.append(step)
        said = f"divergence: {self._found[0]}"
        if self.left_out[-MOST_IN_A_ROW:] == [*range(step - MOST_IN_A_ROW + 1, step + 1)]:
            self._stop(f" So were the {MOST_IN_A_ROW - 1} steps before.")
        if trainer.composed is not None:
            trainer.composed.undo()
        if self.policy == "rollback" and self._good is not None:
            if len(self.rollbacks) == MOST_ROLLBACKS:
                self._stop(f" The run has gone back {MOST_ROLLBACKS} times already.")
            before, copy = self._good
            copy.restore(trainer)
            self._newest = self._good  # the later one may be what led here
            self.rollbacks.append((step, before))
            logger.warning("%s; going back to the state before step %d", said, before)
        else:
            logger.warning("%s; the step is left out", said)
        if args.fp16:  # a scaler that has seen no gradient refuses the step
            with suppress(RuntimeError):  # it has, where they were clipped
                trainer.accelerator.unscale_gradients()
        for parameter in model.parameters():
            parameter.grad = None  # optimisers leave out what has none

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._found = []

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._good = self._newest = None  # as where the run goes on from this checkpoint

    def _elsewhere(self) -> bool:
        assert self._trainer is not None
        mine = torch.tensor(float(self.now), device=self._trainer.args.device)
        found = bool(self._trainer.accelerator.reduce(mine, "sum"))  # all of them must ask
        return found and not self.now

    def _where(self, batches: Sequence[Mapping[str, Mapping]]) -> str:
        """`` at step 3 (NPO), on the rows 4, 11 of forget and 2, 7 of retain``."""
        assert self._trainer is not None
        step, handler = self._trainer.state.global_step + 1, self._trainer.loss.handler
        rows: dict[str, list[int]] = {}
        for batch in batches:
            for part, one in batch.items():
                numbers = one["number"].tolist()
                rows.setdefault(part, []).extend(n for n in numbers if n != BLANK)
        named = [
            ", ".join(map(str, numbers[:MOST_NAMED]))
            + (f", ... ({len(numbers)} in all)" if len(numbers) > MOST_NAMED else "")
            + f" of {part}"
            for part, numbers in rows.items()
        ]
        return f" at step {step} ({handler}), on the rows {' and '.join(named)}, counted from 0"

    def _stop(self, more: str = "") -> None:
        assert self._trainer is not None
        kept = whole_checkpoints(Path(self._trainer.args.output_dir))
        where = (
            f"The last checkpoint is kept: {kept[-1]}."
            if kept
            else "There is no checkpoint: set trainer.args.save_strategy=epoch."
        )
        choice = ", or set trainer.on_divergence=skip or rollback" * (self.policy == "stop")
        raise GuardError(
            f"divergence: {self._found[0]}.{more} Take a lower learning rate or a bounded "
            f"objective{choice}. {where}"
        )


def finite(gradients: Sequence[Tensor | None]) -> bool:
    """Whether all of them are numbers; of those that are split over processes, this one's share."""
    here = [getattr(g, "to_local", lambda g=g: g)() for g in gradients if g is not None]
    if not here:
        return True
    return math.isfinite(float(nn.utils.get_total_norm(here, norm_type=math.inf)))
