"""Watch a training with the guards, from inside."""

import logging
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from unlora.model.guards import (
    gradient_faults,
    gradients_alive,
    lora_b,
    start_equals_target,
    unmoved,
)
from unlora.trainer.nonfinite import Divergence

logger = logging.getLogger(__name__)


class Guards(TrainerCallback):
    """*start equals target* before the first step, *gradients alive* after it.

    Args:
        divergence: knows of steps that were left out, which have no gradients to look at.

    Attributes:
        findings: guard -> what it saw, in words, for the log and the manifest.
        values: guard -> the same as a number, for trackers: of *start equals target* the largest
            difference of logits, of the others 1 where they hold.
    """

    def __init__(self, divergence: Divergence | None = None) -> None:
        self._divergence = divergence
        self.findings: dict[str, str] = {}
        self.values: dict[str, float] = {}
        self._faults: list[str] | None = None
        self._before: dict[str, Tensor] = {}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        if state.global_step == 0 and hasattr(model, "target"):
            comparison = start_equals_target(model, model.target)
            self.found("start equals target", comparison.words, comparison.difference)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        lr_scheduler: Any,
        **kwargs: Any,
    ) -> None:
        # DeepSpeed shows no gradients, and says that it steps when it has; what moves is seen
        new = "gradients alive" not in self.findings and not self._before
        if args.deepspeed_plugin and new and any(lr_scheduler.get_last_lr()):
            self._faults, self._before = [], lora_b(model)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        lr_scheduler: Any,
        **kwargs: Any,
    ) -> None:
        if "gradients alive" in self.findings or args.deepspeed_plugin:
            return
        if self._divergence is not None and self._divergence.step_failed:
            return
        if self._faults is None:
            faults = gradient_faults(model)
            if args.fp16 and any("not finite" in fault for fault in faults):
                return  # the loss scale is still being found; such a step is skipped
            self._faults = faults
        # warm-up starts at a learning rate of zero, and nothing moves in that step
        if any(lr_scheduler.get_last_lr()):
            self._before = lora_b(model)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        if "gradients alive" in self.findings or self._faults is None:
            return
        if self._before or not lora_b(model):
            still = unmoved(model, self._before)
            finding = gradients_alive(self._faults, still)
            if args.deepspeed_plugin:
                moved = f"{len(self._before)} lora_B moved" if self._before else "not checked"
                finding = f"{moved}; DeepSpeed keeps the gradients to itself"
            self.found("gradients alive", finding)
            self._before = {}

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if "gradients alive" not in self.findings:
            words = "not checked: no step had a learning rate above 0"
            self.found("gradients alive", words, None)

    def found(self, guard: str, finding: str, value: float | None = 1.0) -> None:
        """Keep what a guard saw."""
        self.findings[guard] = finding
        if value is not None:
            self.values[guard] = value
        logger.info("guard: %s: %s", guard, finding)
