"""Resume Hugging Face's Trainer to the same result, from whole checkpoints."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import TrainOutput

from unlora.errors import InputError
from unlora.model.lora import restore_adapter, save_adapter
from unlora.model.reference import POLICY
from unlora.runs.atomic_files import sync_files, whole_files
from unlora.trainer.checkpoints import NO_RECORD, best_beside, damage, write_record
from unlora.trainer.dropout_keys import draws_numbers
from unlora.trainer.loss_history import Progress, mean_of_processes
from unlora.trainer.nonfinite import Divergence
from unlora.trainer.resume import Resumption
from unlora.trainer.step_context import StepContext

STATE = "objective.safetensors"  # what the objective remembers, beside the weights


class AlreadyTrained(Exception):
    """There is no step left to make."""


class ResumableTrainer(Trainer):
    """A trainer whose checkpoints are whole, and hold an adapter without its base.

    Args:
        resumption: what the run was made with, and what it goes on from; checkpoints say so.

    Attributes:
        context: what its subclass makes steps with; saved as far as it changes.
        divergence: knows of the steps that were left out.
    """

    context: StepContext
    divergence: Divergence

    def __init__(self, *args: Any, resumption: Resumption | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.resumption, self.progress = resumption or Resumption(), Progress()
        self._loss_sum: Tensor | None = None
        self._mean_loss = 0.0
        self._resumed: str | bool | None = None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Draw the micro-batches of one optimiser step.

        Raises:
            AlreadyTrained: the run goes on from its last step, in the middle of an epoch.
        """
        if self.state.global_step >= self.state.max_steps:
            raise AlreadyTrained
        return super().get_batch_samples(*args, **kwargs)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train, with the losses of the steps before the checkpoint."""
        self._resumed, record = resume_from_checkpoint, self.resumption.record
        self.progress = Progress.of(record.get("progress"), _step_of(resume_from_checkpoint))
        if self.is_world_process_zero():
            self.context.means.load(record.get("noted", {}))
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except AlreadyTrained:  # Trainer would make one more step
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
                self._load_best_model()
            handler = self.callback_handler
            self.control = handler.on_train_end(self.args, self.state, self.control)  # type: ignore[has-type]
            loss = self.progress.mean(0.0, self.state.global_step)
            self.log({"train_runtime": 0.0, "train_loss": loss})  # no step was left
            return TrainOutput(self.state.global_step, loss, {})

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self._loss_sum = tr_loss  # since the last entry of the log, where it becomes 0 in place
        step = self.state.global_step
        if self.control.should_log and step > self._globalstep_last_logged:
            self._mean_loss = self.progress.log(self._loss_since_log(), step)
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def _loss_since_log(self) -> float:
        return mean_of_processes(self.accelerator, self._loss_sum)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the loss as the mean of all processes, also over the steps before a checkpoint."""
        if "loss" in logs:
            logs["loss"] = self._mean_loss
        if "train_loss" in logs:
            logs["train_loss"] = self.progress.mean(self._loss_since_log(), self.state.global_step)
        super().log(logs, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if isinstance(self.model, PeftModel) and not self.is_fsdp_enabled:
            restore_adapter(self.model, folder)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if (folder / STATE).is_file():
            state = load_file(folder / STATE)
            self.context.state.load_state_dict(state)
            self.divergence.load_state_dict(state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self.resumption.keeping_rates(self), _numbers_only(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if draws_numbers(self.model):
            _require_random_state(checkpoint, self.args)
        with _numbers_only(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_callback_state(self) -> None:
        """Trainer's, which has just read the state; a copied run has the best one of the copy."""
        if self.state.best_model_checkpoint and isinstance(self._resumed, str):
            best = best_beside(self._resumed, self.state.best_model_checkpoint)
            self.state.best_model_checkpoint = best
        super()._load_callback_state()

    def _load_best_model(self) -> None:
        _require_whole_best(self.state.best_model_checkpoint)
        split = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if isinstance(self.model, PeftModel) and not split:
            restore_adapter(self.model, Path(str(self.state.best_model_checkpoint)))
        else:
            super()._load_best_model()

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save the model including frozen adapter weights, which ZeRO-3 would drop."""
        with _all_of_adapter(self.model):
            super().save_model(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        folder = Path(output_dir or self.args.output_dir)
        # Trainer calls this in every process, and only the first has weights that were gathered
        if isinstance(model, PeftModel) and not self.args.should_save:
            return
        with whole_files(folder) as new:
            if state := self.context.state.state_dict() | self.divergence.state_dict():
                save_file(state, new / STATE)
            if isinstance(model, PeftModel):
                self.processing_class.save_pretrained(str(new))
            else:
                super()._save(str(new), state_dict)
                # a pickle of all settings, tokens and all, that nobody reads
                (new / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        if isinstance(model, PeftModel):
            save_adapter(model, folder, state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint; it is whole once its ``trainer_state.json``, the last, is there."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)  # of an earlier attempt
        facts = self.resumption.facts() | {
            "weights_only": self.args.save_only_model,
            "progress": self.progress.facts(self._loss_since_log()),
            "noted": self.context.means.gather(),
        }
        self.state.save_to_json = partial(_write_state, self.state, facts=facts)
        super()._save_checkpoint(model, trial)

    def save_state(self) -> None:
        """Save the trainer's state, whole."""
        self.state.save_to_json = partial(_write_state, self.state)
        super().save_state()

    def _save_rng_state(self, output_dir: str) -> None:
        """The last of a checkpoint before its state: every process has written what is its own."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            sync_files(Path(output_dir))


def _write_state(state: TrainerState, file: str, facts: Mapping[str, Any] | None = None) -> None:
    """Write what ``TrainerState.save_to_json`` writes, whole; with facts, a checkpoint's record."""
    with whole_files(Path(file).parent) as new:
        TrainerState.save_to_json(state, str(new / Path(file).name))
        if facts is not None:
            write_record(Path(file).parent, new / Path(file).name, facts)


def _step_of(checkpoint: str | bool | None) -> int:
    """Read after which step a checkpoint was written; 0 where there is none."""
    if not isinstance(checkpoint, str):
        return 0
    return int(TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step)


@contextmanager
def _numbers_only(checkpoint: str | None) -> Iterator[None]:
    """Load transformers' pickles of the optimiser and the random state, which it reads safely.

    Raises:
        InputError: one of them holds more than numbers.
    """
    try:
        yield
    except UnpicklingError as error:
        raise InputError(
            f"The checkpoint {str(checkpoint)!r} holds more than tensors and numbers in its "
            "optimizer.pt, scheduler.pt or rng_state.pth, and is not read: such a file can run "
            "code. Resume from a checkpoint of your own."
        ) from error


def _require_random_state(checkpoint: str | None, args: TrainingArguments) -> None:
    """Raise InputError where a checkpoint has no random state for this process."""
    several = args.world_size > 1
    name = f"rng_state_{args.process_index}.pth" if several else "rng_state.pth"
    if checkpoint and not (Path(checkpoint) / name).is_file():
        raise InputError(
            f"The checkpoint {checkpoint!r} has no {name}: another number of processes wrote "
            "it, and this model draws random numbers of its own in training. Start as many "
            "processes as before."
        )


def _require_whole_best(checkpoint: str | None) -> None:
    """Raise InputError where the best checkpoint is not as it was written."""
    why = damage(str(checkpoint))
    if why and why != NO_RECORD:  # another machine's disk may have the record
        raise InputError(
            f"The best checkpoint, {checkpoint}, cannot be taken: {why}. "
            "Train again from an earlier checkpoint, or without load_best_model_at_end."
        )


@contextmanager
def _all_of_adapter(model: nn.Module) -> Iterator[None]:
    """Mark the frozen weights of the policy's adapter as trained: ZeRO-3 saves no others."""
    named = model.named_parameters() if isinstance(model, PeftModel) else ()
    frozen = [p for name, p in named if f".{POLICY}." in name and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
