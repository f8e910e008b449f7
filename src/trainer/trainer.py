"""One trainer for fine-tuning and for every objective."""

import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import TrainOutput

from unlora.data.collate import collate_parts
from unlora.data.pairs import BLANK, KeyedSampler, Parts
from unlora.errors import InputError
from unlora.forward.capabilities import found_way
from unlora.forward.keyed_dropout import row_keys
from unlora.forward.outputs import (
    PLAIN,
    Batch,
    Hidden,
    Outputs,
    Padded,
    ScoredTokens,
    SequenceLogps,
    TokenLogps,
    ask_all,
    ask_padded,
    check_layer,
    scored_tokens,
)
from unlora.model.adapter_init import has_start
from unlora.model.guards import evaluation_is_pure
from unlora.model.lora import restore_adapter, save_adapter
from unlora.model.reference import POLICY, as_reference, frozen_copy, rest_above
from unlora.objectives import View
from unlora.runs.run import sync_files, whole_files
from unlora.trainer import constraint as constraints
from unlora.trainer.checkpoints import NO_RECORD, best_beside, damage, write_record
from unlora.trainer.composed_step import ComposedStep
from unlora.trainer.dropout_keys import KeepKeys, draws_numbers, key_dropout
from unlora.trainer.loss import SUBTRACTED, Totals, UnlearningLoss
from unlora.trainer.microbatches import Pieces
from unlora.trainer.nonfinite import Divergence, StepDiverged
from unlora.trainer.plugins import Plugins
from unlora.trainer.progress import Progress, mean_of_processes
from unlora.trainer.reference_logps import known_logps
from unlora.trainer.resume import Resumption

NO_PLUGINS = Plugins()
STATE = "objective.safetensors"
Penalty = Callable[[nn.Module], Tensor]


class AlreadyTrained(Exception):
    """There is no step left to make."""


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
        plugins: what is done to the gradients of the terms.
        penalty: a loss on the weights alone, added to that on the data.
        divergence: what is done where a loss or a gradient is no number.
        resumption: what the run was made with, and what it goes on from; checkpoints say so.
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
        resumption: Resumption | None = None,
        **kwargs: Any,
    ):
        self.pad_id = kwargs["processing_class"].pad_token_id
        self.divergence = divergence or Divergence()
        kwargs["callbacks"] = [self.divergence, KeepKeys(), *(kwargs.get("callbacks") or ())]
        super().__init__(
            *args,
            train_dataset=parts,
            # Trainer insists on one when it is to evaluate; ours go through the panels
            eval_dataset=parts,
            data_collator=partial(collate_parts, pad_id=self.pad_id),
            **kwargs,
        )
        self.loss, self.parts, self.panels = loss, parts, panels
        self.plugins, self.penalty = plugins, penalty
        self.resumption = resumption or Resumption()
        composes = plugins.compose_gradients or loss.constraint is not None
        self.composed = ComposedStep(self) if composes else None
        # then weights are there in a pass only
        split = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if composes and (self.args.fp16 or split):
            raise InputError(
                "A step that is composed of several gradients (SAM, GRU, BalDRO, PDU, BLADE) needs "
                "them as they are: set trainer.args.bf16 in place of fp16, without deepspeed or "
                "fsdp."
            )
        started = isinstance(self.model, PeftModel) and has_start(self.model)
        if split and (loss.handler in SUBTRACTED or started):
            raise InputError(
                "Task vectors (Negation, PerTA) and adapters that do not start from zero (FILA, "
                "ReGLU, PiSSA, OLoRA) need whole weights: train without deepspeed or fsdp."
            )
        if self.args.gradient_checkpointing and isinstance(self.model, PeftModel):
            # re-entrant checkpointing stops the gradient where no input requires one
            self.model.enable_input_require_grads()
        # our loss brings its own share of the effective batch, see compute_loss
        self.model_accepts_loss_kwargs = False
        self.way = PLAIN if split else found_way(self.model, self.args.device)
        live = loss.asked_of_reference(TokenLogps, Outputs, Hidden, Padded)
        needs_copy = bool(live) and not isinstance(self.model, PeftModel)
        self.frozen = frozen_copy(self.model) if needs_copy else None
        if loss.layer is not None:
            check_layer(self.model, loss.layer)
            if loss.ends_at_layer:
                rest_above(self.model, loss.layer)
        width = self.model.config.get_text_config().hidden_size
        self.drawn = {
            name: draw(width, self.args.seed).to(self.args.device)
            for term in loss.terms.values()
            for name, draw in term.draws.items()
        }
        self.divergence.watch(self)
        self.pieces = Pieces(self)
        self.keyed = key_dropout(self.model, self.args.seed)
        self.known: Mapping[str, Tensor] = {}  # part -> log p under the reference, row by row
        self.micro_batches: Sequence[Mapping] = ()
        self._logged: dict[str, list[float]] = defaultdict(list)
        self.progress = Progress()
        self._loss_sum: Tensor | None = None
        self._mean_loss = 0.0

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
        one = self.args.world_size == 1 or self.args.dataloader_drop_last
        at_once = 1 if one else self.args.world_size * self.args.train_batch_size
        return KeyedSampler(self.parts, seed, at_once)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[dict], Totals]:
        """The micro-batches of one optimiser step, and how many losses each term has on them.

        Raises:
            AlreadyTrained: the run goes on from its last step, in the middle of an epoch.
        """
        if self.state.global_step >= self.state.max_steps:
            raise AlreadyTrained
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.micro_batches = batches
        return batches, self.totals(batches)

    def totals(
        self, batches: Sequence[Mapping[str, Mapping]], terms: Sequence[str] | None = None
    ) -> Totals:
        counted = {name: t for name, t in self.loss.terms.items() if terms is None or name in terms}
        counts = [
            sum(
                term.count(batch[term.part]["labels"])
                for batch in batches
                if not self.is_blank(batch)
            )
            for term in counted.values()
        ]
        local = torch.tensor(counts, device=self.args.device)
        everywhere = self.accelerator.reduce(local, "sum")
        return dict(zip(counted, everywhere, strict=True))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Mapping[str, Tensor]],
        return_outputs: bool = False,
        num_items_in_batch: Totals | None = None,
    ) -> Any:
        """The loss of one micro-batch, scaled so that Trainer's means give that of them all."""
        losses = self.losses(model, inputs, num_items_in_batch)
        # Trainer divides by the accumulation steps, and the processes' gradients are averaged
        split = 1
        if num_items_in_batch is not None:
            split = self.current_gradient_accumulation_steps * self.args.world_size
        for name, value in losses.items():
            if self.finite(name, number := float(value.detach()), [inputs]):
                self.note(f"{name}_loss", number * split)
        weights = self.loss.weights
        total = torch.stack([weights[name] * value for name, value in losses.items()]).sum() * split
        if self.penalty is not None:
            # once for a micro-batch, in however many pieces it comes
            total = total + self.penalty(self.accelerator.unwrap_model(model)) / self.pieces.now
        return (total, losses) if return_outputs else total

    def losses(
        self,
        model: nn.Module,
        inputs: Mapping[str, Mapping[str, Tensor]],
        totals: Totals | None = None,
        *,
        terms: Sequence[str] = ("forget", "retain"),
        row_weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The losses of these terms on one micro-batch; asks the models what the terms declare."""
        views = self.views(model, inputs, terms)
        found = self.loss.losses(views, totals, drawn=self.drawn, row_weights=row_weights)
        return {name: 0 * x for name, x in found.items()} if self.is_blank(inputs) else found

    def is_blank(self, inputs: Mapping[str, Mapping[str, Tensor]]) -> bool:
        """Whether this process has no row of its own here, at the end of an epoch."""
        several = self.args.world_size > 1  # elsewhere no GPU is waited for
        return several and all(int(batch["number"][0]) == BLANK for batch in inputs.values())

    def views(
        self, model: nn.Module, inputs: Mapping[str, Mapping[str, Tensor]], terms: Sequence[str]
    ) -> dict[str, View]:
        """What the models say, as far as these terms ask."""
        wanted = {
            view
            for name in terms
            if name in self.loss.terms
            for view in self.loss.terms[name].views
        }
        found: dict[str, View] = {}
        asked: dict[str, dict[str, type]] = {"policy": {}, "reference": {}}
        for view, kind in self.loss.views.items():
            who, part = view.split("_")
            if view not in wanted:
                continue
            if kind is ScoredTokens:
                found[view] = scored_tokens(inputs[part])
            elif kind is SequenceLogps and who == "reference" and part in self.known:
                found[view] = SequenceLogps(self.known[part][inputs[part]["number"]])
            else:
                asked[who][part] = kind
        for who, kinds in asked.items():
            if who == "policy":
                answers = self._ask(model, kinds, self._with_keys(inputs))
            elif kinds:
                with as_reference(self.accelerator.unwrap_model(model), self.frozen) as reference:
                    answers = self._ask(reference, kinds, inputs)
            else:
                answers = {}
            found |= {f"{who}_{part}": answer for part, answer in answers.items()}
        return found

    def _with_keys(self, inputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Batch]:
        """The batches with a key for each row, which its dropout goes by.

        A row of the anchor comes once in a step, and the others are known by the one they meet.
        """
        if not self.keyed:
            return dict(inputs)
        anchor = inputs.get(self.parts.anchor)
        drawn = self.composed.inner_steps if self.composed else 0
        step = self.args.seed, self.state.global_step, drawn
        return {
            part: {
                **batch,
                "key": row_keys((anchor or batch)["number"], *step, zlib.crc32(part.encode())),
            }
            for part, batch in inputs.items()
        }

    def _ask(
        self, model: nn.Module, kinds: Mapping[str, type], inputs: Mapping[str, Mapping]
    ) -> dict[str, View]:
        """What one model says of each part, in as few passes as there can be."""
        found: dict[str, View] = {}
        groups: dict[bool, list[str]] = {True: [], False: []}  # a pass for states ends early
        for part, kind in kinds.items():
            if kind is Padded:
                found[part] = ask_padded(model, inputs[part])
            else:
                groups[kind is Hidden].append(part)
        for parts in filter(None, groups.values()):
            wants = {
                part: TokenLogps if kinds[part] is SequenceLogps else kinds[part] for part in parts
            }
            answers = ask_all(
                model,
                [(wants[part], inputs[part]) for part in parts],
                layer=self.loss.layer,
                way=self.way,
            )
            for part, answer in zip(parts, answers, strict=True):
                if kinds[part] is SequenceLogps:
                    assert isinstance(answer, TokenLogps)
                    found[part] = SequenceLogps(answer.sequence_logps)
                else:
                    found[part] = answer
        return found

    def finite(
        self, term: str, value: float, batches: Sequence[Mapping], *, alike: bool = False
    ) -> bool:
        """Whether the loss of these micro-batches is a number; see ``Divergence.saw``."""
        if not math.isfinite(value):
            self.divergence.saw(f"{term}_loss", value, batches, alike=alike)
        return math.isfinite(value)

    def note(self, name: str, value: float) -> None:
        """Log a number; the log has its mean since the last time."""
        self._logged[name].append(value)

    def num_noted(self) -> dict[str, int]:
        """How many numbers are noted under each name, for the two below."""
        return {name: len(numbers) for name, numbers in self._logged.items()}

    def add_up_notes(self, since: Mapping[str, int]) -> None:
        """Of each name, one note that is the sum of those that came since then."""
        for name, numbers in self._logged.items():
            if new := numbers[since.get(name, 0) :]:
                numbers[since.get(name, 0) :] = [sum(new)]

    def forget_notes(self, since: Mapping[str, int]) -> None:
        """Drop what was noted since then."""
        for name, numbers in self._logged.items():
            del numbers[since.get(name, 0) :]

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Totals | None = None,
    ) -> Tensor:
        """One micro-batch; where the terms' gradients are composed, the first stands for all."""
        nothing = loss = torch.zeros((), device=self.args.device)
        if self.composed is None:
            one = super().training_step
            loss = self.pieces.one(inputs, lambda piece: one(model, piece, num_items_in_batch))
            return nothing if self.divergence.now else loss  # a sum of losses would stay no number
        if inputs is self.micro_batches[0]:
            assert num_items_in_batch is not None
            model.train()
            take = partial(self.composed.take, model, totals=num_items_in_batch)
            with suppress(StepDiverged):
                loss = self.pieces.all(take)
        constraint = self.loss.constraint
        # with the last one only: Trainer leaves at once, and the step must have been made
        if inputs is self.micro_batches[-1] and constraint is not None and constraint.converged:
            self.control.should_training_stop = True
        return loss

    # --- what a run remembers beside the weights -------------------------------------------------

    def remembered(self) -> dict[str, Tensor]:
        """The state of the objective and its plug-ins, as it is saved with the model."""
        found = {f"drawn.{name}": tensor for name, tensor in self.drawn.items()}
        if self.loss.constraint is not None:
            for name, value in constraints.state(self.loss.constraint).items():
                found[f"constraint.{name}"] = torch.tensor(value, dtype=torch.float64)
        if self.composed is not None:
            average = enumerate(self.composed.retain_average or ())
            found |= {f"retain_average.{i}": tensor for i, tensor in average}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    def _recall(self, folder: Path) -> None:
        if not (folder / STATE).is_file():
            return
        self.recall(found := load_file(folder / STATE))
        self.divergence.recall(found)

    def recall(self, remembered: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`remembered` gave."""
        found = {name: tensor.to(self.args.device) for name, tensor in remembered.items()}
        self.drawn |= {n.split(".")[1]: t for n, t in found.items() if n.startswith("drawn.")}
        if self.loss.constraint is not None:
            saved = {n.split(".")[1]: float(t) for n, t in found.items() if n.startswith("con")}
            constraints.restore(self.loss.constraint, saved)
        kept = sum(n.startswith("retain_average.") for n in found)
        if self.composed is not None:
            average = [found[f"retain_average.{i}"] for i in range(kept)]
            self.composed.retain_average = average or None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if isinstance(self.model, PeftModel) and not self.is_fsdp_enabled:
            restore_adapter(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._recall(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self.resumption.keeping_rates(self), _pickles_of_numbers(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        several = self.args.world_size > 1
        name = f"rng_state_{self.args.process_index}.pth" if several else "rng_state.pth"
        if checkpoint and not (Path(checkpoint) / name).is_file() and draws_numbers(self.model):
            raise InputError(
                f"The checkpoint {checkpoint!r} has no {name}: another number of processes wrote "
                "it, and this model draws random numbers of its own in training. Start as many "
                "processes as before."
            )
        with _pickles_of_numbers(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_callback_state(self) -> None:
        """Trainer's, which has just read the state; a copied run has the best one of the copy."""
        if self.state.best_model_checkpoint and isinstance(self._resumed, str):
            best = best_beside(self._resumed, self.state.best_model_checkpoint)
            self.state.best_model_checkpoint = best
        super()._load_callback_state()

    def _load_best_model(self) -> None:
        why = damage(str(self.state.best_model_checkpoint))
        if why and why != NO_RECORD:  # another machine's disk may have the record
            raise InputError(
                f"The best checkpoint, {self.state.best_model_checkpoint}, cannot be taken: {why}. "
                "Train again from an earlier checkpoint, or without load_best_model_at_end."
            )
        split = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if isinstance(self.model, PeftModel) and not split:
            restore_adapter(self.model, Path(str(self.state.best_model_checkpoint)))
        else:
            super()._load_best_model()

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train; numbers that the reference gives once and for all are found first."""
        # a model that is trained in full is its own reference before the first step only
        self.known = self.known or known_logps(self)
        self._resumed = resume_from_checkpoint
        record, step = self.resumption.record, 0
        if isinstance(resume_from_checkpoint, str):
            file = Path(resume_from_checkpoint) / TRAINER_STATE_NAME
            step = TrainerState.load_from_json(str(file)).global_step
        self.progress = Progress.of(record.get("progress"), step)
        if self.is_world_process_zero():
            self._logged.update({name: [*seen] for name, seen in record.get("noted", {}).items()})
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except AlreadyTrained:  # Trainer would make one more step
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
                self._load_best_model()
            handler = self.callback_handler
            self.control = handler.on_train_end(self.args, self.state, self.control)  # type: ignore[has-type]
            loss = self.progress.mean(0.0, self.state.global_step)
            self.log({"train_loss": loss})
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
        """Log the terms of the loss beside the loss, as means since the last time.

        As the loss they are those of all processes, each of which has seen rows of its own; and
        also of the steps before a checkpoint that the run went on from.
        """
        if "loss" in logs:
            logs["loss"] = self._mean_loss
            logs |= _means(_joined(gather_object([dict(self._logged)])))
            self._logged.clear()
        if "train_loss" in logs:
            logs["train_loss"] = self.progress.mean(self._loss_since_log(), self.state.global_step)
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
        self.control = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's, with what rests of the adapter: under ZeRO-3 it leaves out what is frozen."""
        named = self.model.named_parameters() if isinstance(self.model, PeftModel) else ()
        resting = [p for name, p in named if f".{POLICY}." in name and not p.requires_grad]
        for parameter in resting:
            parameter.requires_grad_(True)
        try:
            super().save_model(*args, **kwargs)
        finally:
            for parameter in resting:
                parameter.requires_grad_(False)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        folder = Path(output_dir or self.args.output_dir)
        # Trainer calls this in every process, and only the first has weights that were gathered
        if isinstance(model, PeftModel) and not self.args.should_save:
            return
        with whole_files(folder) as new:
            if state := self.remembered() | self.divergence.remembered():
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
        """Trainer's; it is whole once its ``trainer_state.json`` is there, which comes last."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)  # of an earlier attempt
        facts = self.resumption.facts() | {
            "weights_only": self.args.save_only_model,
            "progress": self.progress.facts(self._loss_since_log()),
            "noted": _joined(gather_object([dict(self._logged)])),
        }
        self.state.save_to_json = partial(_write_state, self.state, facts=facts)
        super()._save_checkpoint(model, trial)

    def save_state(self) -> None:
        """Trainer's, whole."""
        self.state.save_to_json = partial(_write_state, self.state)
        super().save_state()

    def _save_rng_state(self, output_dir: str) -> None:
        """The last of a checkpoint before its state: every process has written what is its own."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            sync_files(Path(output_dir))


@contextmanager
def _pickles_of_numbers(checkpoint: str | None) -> Iterator[None]:
    """transformers keeps the optimiser and the random state as pickles, and reads only numbers.

    Raises:
        InputError: something else is in one of them.
    """
    try:
        yield
    except UnpicklingError as error:
        raise InputError(
            f"The checkpoint {str(checkpoint)!r} holds more than tensors and numbers in its "
            "optimizer.pt, scheduler.pt or rng_state.pth, and is not read: such a file can run "
            "code. Resume from a checkpoint of your own."
        ) from error


def _write_state(state: TrainerState, file: str, facts: Mapping[str, Any] | None = None) -> None:
    """What ``TrainerState.save_to_json`` writes, whole; with facts, the record of a checkpoint."""
    with whole_files(Path(file).parent) as new:
        TrainerState.save_to_json(state, str(new / Path(file).name))
        if facts is not None:
            write_record(Path(file).parent, new / Path(file).name, facts)


def _joined(noted: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """The numbers that several processes have noted, under each name."""
    names = dict.fromkeys(name for one in noted for name in one)
    return {name: [number for one in noted for number in one.get(name, ())] for name in names}


def _means(noted: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: sum(seen) / len(seen) for name, seen in noted.items() if seen}
