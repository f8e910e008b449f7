"""One trainer for fine-tuning and for every objective."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer

from unlora.data.collate import collate_parts
from unlora.data.pairs import KeyedSampler, Parts
from unlora.errors import GuardError
from unlora.model.guards import evaluation_is_pure
from unlora.model.lora import save_adapter
from unlora.model.reference import as_reference, frozen_copy
from unlora.outputs import Outputs, ask
from unlora.trainer.loss import Totals, UnlearningLoss


class Panel(Protocol):
    """A cheap evaluation during training: the values of a few metrics."""

    def __call__(self, model: nn.Module) -> dict[str, float]: ...


class UnlearningTrainer(Trainer):
    """Hugging Face's Trainer whose loss is an ``UnlearningLoss``; it alone asks a model for one.

    Args:
        parts: the data; a batch is ``{"forget": batch, "retain": batch, "alternate": batch}``, as
            far as the loss needs them.
        panels: evaluations that run where Trainer evaluates; their values are logged as
            ``eval_<name>`` and may choose the best checkpoint.
    """

    def __init__(
        self,
        *args: Any,
        loss: UnlearningLoss,
        parts: Parts,
        panels: Sequence[Panel] = (),
        **kwargs: Any,
    ):
        pad_id = kwargs["processing_class"].pad_token_id
        super().__init__(
            *args,
            train_dataset=parts,
            # Trainer insists on one when it is to evaluate; ours go through the panels
            eval_dataset=parts,
            data_collator=partial(collate_parts, pad_id=pad_id),
            **kwargs,
        )
        self.loss, self.parts, self.panels = loss, parts, panels
        if self.args.gradient_checkpointing and isinstance(self.model, PeftModel):
            # re-entrant checkpointing stops the gradient where no input requires one
            self.model.enable_input_require_grads()
        # our loss brings its own share of the effective batch, see compute_loss
        self.model_accepts_loss_kwargs = False
        needs_copy = loss.needs_reference and not isinstance(self.model, PeftModel)
        self.frozen = frozen_copy(self.model) if needs_copy else None
        self._logged: dict[str, list[float]] = defaultdict(list)

    def _get_train_sampler(self, train_dataset: Parts | None = None) -> Sampler:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return KeyedSampler(self.parts, seed)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[dict], Totals]:
        """The micro-batches of one optimiser step, and how many losses each term has on them."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, self._totals(batches, device)

    def _totals(self, batches: Sequence[Mapping[str, Mapping]], device: torch.device) -> Totals:
        counts = [
            sum(term.count(batch[term.part]["labels"]) for batch in batches)
            for term in self.loss.terms.values()
        ]
        local = torch.tensor(counts, device=device)
        everywhere = self.accelerator.reduce(local, "sum")
        return dict(zip(self.loss.terms, everywhere, strict=True))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Mapping[str, Tensor]],
        return_outputs: bool = False,
        num_items_in_batch: Totals | None = None,
    ) -> Any:
        """The loss of one micro-batch, scaled so that Trainer's means give that of them all."""
        views = {view: self.answer(model, view, inputs) for view in self.loss.views}
        total, parts = self.loss(views, num_items_in_batch)
        # Trainer divides by the accumulation steps, and the processes' gradients are averaged
        split = 1
        if num_items_in_batch is not None:
            split = self.current_gradient_accumulation_steps * self.args.world_size
        for name, value in parts.items():
            if not value.isfinite():
                raise GuardError(
                    f"divergence: {name} is {float(value)} at step {self.state.global_step + 1}. "
                    "Take a lower learning rate or a bounded objective; checkpoints are kept."
                )
            self._logged[name].append(float(value) * split)
        return (total * split, parts) if return_outputs else total * split

    def answer(self, model: nn.Module, view: str, inputs: Mapping[str, Mapping]) -> Outputs:
        """Run one forward pass: ``view`` is ``{policy,reference}_{forget,retain,alternate}``."""
        who, part = view.split("_")
        if who == "policy":
            return ask(model, inputs[part])
        with as_reference(self.accelerator.unwrap_model(model), self.frozen) as reference:
            return ask(reference, inputs[part])

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the terms of the loss beside the loss, as means since the last time."""
        if "loss" in logs:
            logs |= {name: sum(seen) / len(seen) for name, seen in self._logged.items() if seen}
            self._logged.clear()
        super().log(logs, *args, **kwargs)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Run the panels; the guard makes sure that training goes on with the same model."""
        model = self.accelerator.unwrap_model(self.model)
        found: dict[str, float] = {}
        with evaluation_is_pure(model):
            for panel in self.panels:
                found |= panel(model)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        handler = self.callback_handler
        self.control = handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PeftModel):
            # training_args.bin would carry the token along
            self.args.hub_token = None
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_adapter(model, folder, state_dict)
        self.processing_class.save_pretrained(str(folder))
