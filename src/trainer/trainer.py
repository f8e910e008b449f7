"""Adapt Hugging Face's Trainer to fine-tuning and to every objective."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from torch.utils.data import Sampler

from unlora.data.collate import collate_parts
from unlora.data.pairs import KeyedSampler, Parts
from unlora.model.guards import evaluation_is_pure
from unlora.trainer.composed_step import (
    ComposedStep,
    NonFiniteLoss,
    Penalty,
    is_composed,
    require_whole_gradients,
)
from unlora.trainer.dropout_keys import KeepKeys
from unlora.trainer.loss import Totals, UnlearningLoss
from unlora.trainer.microbatches import MicrobatchSplitter
from unlora.trainer.nonfinite import Divergence
from unlora.trainer.plugins import Plugins
from unlora.trainer.resumable_trainer import ResumableTrainer
from unlora.trainer.step_context import make_context
from unlora.trainer.term_losses import Batch

NO_PLUGINS = Plugins()


class Panel(Protocol):
    """A cheap evaluation during training: the values of a few metrics."""

    def __call__(self, model: nn.Module) -> dict[str, float]: ...


class UnlearningTrainer(ResumableTrainer):
    """A trainer whose loss is an ``UnlearningLoss``.

    Args:
        parts: the data; a batch is ``{"forget": batch, "retain": batch, "alternate": batch}``, as
            far as the loss needs them.
        panels: evaluations that run where Trainer evaluates; their values are logged as
            ``eval_<name>`` and may choose the best checkpoint.
        plugins: what is done to the gradients of the terms.
        penalty: a loss on the weights alone, added to that on the data.
        divergence: what is done where a loss or a gradient is not finite.
    """

    def __init__(
        self,
        *args: Any,
        loss: UnlearningLoss,
        parts: Parts,
        panels: Sequence[Panel] = (),
        plugins: Plugins = NO_PLUGINS,
        penalty: Penalty | None = None,
        divergence: Divergence | None = None,
        **kwargs: Any,
    ):
        pad_id = kwargs["processing_class"].pad_token_id
        self.divergence = divergence or Divergence()
        kwargs["callbacks"] = [self.divergence, KeepKeys(), *(kwargs.get("callbacks") or ())]
        super().__init__(
            *args,
            train_dataset=parts,
            # Trainer insists on one when it is to evaluate; ours go through the panels
            eval_dataset=parts,
            data_collator=partial(collate_parts, pad_id=pad_id),
            **kwargs,
        )
        self.loss, self.parts, self.panels = loss, parts, panels
        self.plugins, self.penalty = plugins, penalty
        # then weights are there in a pass only
        split = self.is_deepspeed_enabled or self.is_fsdp_enabled
        require_whole_gradients(self.model, loss, plugins, fp16=self.args.fp16, split=split)
        if self.args.gradient_checkpointing and isinstance(self.model, PeftModel):
            # re-entrant checkpointing stops the gradient where no input requires one
            self.model.enable_input_require_grads()
        # our loss brings its own share of the effective batch, see compute_loss
        self.model_accepts_loss_kwargs = False
        self.context = make_context(
            self.model, loss, parts, pad_id=pad_id, args=self.args, accelerator=self.accelerator,
            trainer_state=lambda: self.state, autocast=self.compute_loss_context_manager,
            split=split,
        )  # fmt: skip
        self.splitter, self.composed = MicrobatchSplitter(self.context), None
        if is_composed(loss, plugins):
            self.composed = ComposedStep(self.context, plugins, penalty)
        undo = self.composed.undo if self.composed else None
        self.divergence.watch(self.context, undo, split=split)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Trainer's, or peft's LoRA+."""
        plus = self.plugins.lora_plus
        if plus is not None and self.optimizer is None:  # type: ignore[has-type]
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = create_loraplus_optimizer(
                self.model, kind, loraplus_lr_ratio=plus.ratio,
                loraplus_weight_decay=self.args.weight_decay, **settings,
            )  # fmt: skip
            return self.optimizer
        return super().create_optimizer(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Parts | None = None) -> Sampler:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        alone = self.args.world_size == 1 or self.args.dataloader_drop_last
        at_once = 1 if alone else self.args.world_size * self.args.train_batch_size
        return KeyedSampler(self.parts, seed, at_once)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[dict], Totals]:
        """Draw the micro-batches of one optimiser step; count the losses of each term on them."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.splitter.start_step(batches)
        self.divergence.batches = batches
        return batches, self.context.losses.totals(batches)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Totals | None = None,
    ) -> Any:
        """Compute the loss of one micro-batch so that Trainer's means give that of them all."""
        losses = self.context.losses.compute(model, inputs, num_items_in_batch)
        # Trainer divides by the accumulation steps, and the processes' gradients are averaged
        split = 1
        if num_items_in_batch is not None:
            split = self.current_gradient_accumulation_steps * self.args.world_size
        for name, loss in losses.items():
            if math.isfinite(value := float(loss.detach())):
                self.context.means.add(f"{name}_loss", value * split)
            else:
                self.divergence.report(f"{name}_loss", value, [inputs])
        weights = self.loss.weights
        total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum() * split
        if self.penalty is not None:
            # once for a micro-batch, in however many pieces it comes
            penalty = self.penalty(self.accelerator.unwrap_model(model))
            total = total + penalty / self.splitter.pieces_now
        return (total, losses) if return_outputs else total

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Totals | None = None,
    ) -> Tensor:
        """Run one micro-batch; where the terms' gradients are composed, the first runs all."""
        loss, run_piece = None, super().training_step
        if self.composed is None:
            loss = self.splitter.run(lambda piece: run_piece(model, piece, num_items_in_batch))
        else:
            assert num_items_in_batch is not None
            step = partial(self.composed.compute_gradients, model, totals=num_items_in_batch)
            try:
                loss = self.splitter.run_step(step, self.composed.undo)
            except NonFiniteLoss as error:
                self.divergence.report(error.name, error.value, error.batches, everywhere=True)
            # with the last one only: Trainer leaves at once, and the step must have been made
            if self.splitter.step_is_done and self.composed.converged:
                self.control.should_training_stop = True
        if loss is None or self.divergence.step_failed:  # a sum of losses would stay NaN
            return torch.zeros((), device=self.args.device)
        return loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; log-probabilities of the reference are computed first."""
        # a model that is trained in full is its own reference before the first step only
        model = self.accelerator.unwrap_model(self.model)
        self.context.losses.precompute_reference(model, self.parts.rows, self.context.pad_id)
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the terms of the loss beside the loss, as means since the last time.

        As the loss they are those of all processes, each of which has seen rows of its own; and
        also of the steps before a checkpoint that the run went on from.
        """
        if "loss" in logs:
            logs |= self.context.means.pop()
        super().log(logs, *args, **kwargs)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Run the panels; the guard makes sure that training goes on with the same model."""
        model = self.accelerator.unwrap_model(self.model)
        values: dict[str, float] = {}
        with evaluation_is_pure(model):
            for panel in self.panels:
                values |= panel(model)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        self.log(dict(metrics))
        handler = self.callback_handler
        self.control = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
