"""Check a plan for a training, load its data, load its model; in this order."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from unlora.config.schema import Config
from unlora.data import load_parts
from unlora.data.chat_encoding import Chat
from unlora.data.first_row import as_lines, pieces
from unlora.data.pairs import Parts
from unlora.data.row_texts import RowText
from unlora.errors import InputError
from unlora.evals import build_suites
from unlora.evals.harness import HarnessSuite
from unlora.evals.suite import Suite
from unlora.model import ResolvedModel, check_model, get_model, load_tokenizer, resolve_model
from unlora.model.fingerprints import content_of
from unlora.recipes import baselines
from unlora.runs.atomic_files import is_main_process
from unlora.runs.row_hashes import key_file, read_key
from unlora.trainer import (
    SUBTRACTED,
    Plugins,
    Resumption,
    TaskVector,
    UnlearningLoss,
    check_optimiser,
    checkpoint_to_resume,
    choose_best_by,
    refuse_own_model,
    resumption,
    run_settings,
    set_checkpointing,
    set_warmup,
    start_adapter,
    training_arguments,
)
from unlora.trainer.batch_layout import choose_layout
from unlora.trainer.checkpointing import available_memory
from unlora.trainer.composed_step import Penalty
from unlora.trainer.largest_batch import largest, size_of
from unlora.trainer.memory_estimate import estimate
from unlora.trainer.orthogonal import added, keep_orthogonal

logger = logging.getLogger("unlora.recipes.train")


@dataclass(frozen=True)
class TrainingData:
    """What a training and its evaluations read.

    Attributes:
        panels: the cheap evaluations during training.
        resumption: the settings of this run, and of the checkpoint that it goes on from.
        texts: of the rows, by part, for their hashes.
    """

    parts: Parts
    suites: Sequence[Suite | HarnessSuite]
    panels: Sequence[Callable]
    resumption: Resumption
    texts: Mapping[str, Sequence[RowText]]


@dataclass(frozen=True)
class StartingModel:
    """The model that a training starts from.

    Attributes:
        penalty: what its start adds to the loss.
        vector: what is subtracted when training is over.
    """

    network: nn.Module
    tokenizer: PreTrainedTokenizerBase
    penalty: Penalty | None = None
    vector: TaskVector | None = None


@dataclass(frozen=True)
class TrainingPlan:
    """A training that config, model folder and package versions allow; nothing is loaded yet.

    Attributes:
        config: with the defaults of the run that trained the model.
        args: with trackers left out; the trainer would close them before the evaluation.
        trackers: ``trainer.args.report_to``.
        references: the models that the evaluation compares with.
        resume: the checkpoint to go on from.
    """

    config: Config
    model: ResolvedModel
    loss: UnlearningLoss
    plugins: Plugins
    args: TrainingArguments
    trackers: Sequence[str]
    references: baselines.Found
    resume: str | None

    @classmethod
    def check(cls, config: Config, *, evaluate: bool = True) -> "TrainingPlan":
        """Find what can be wrong before data are read.

        Args:
            evaluate: whether the result is evaluated.

        Raises:
            InputError: something in the config or the model can be put right.
        """
        model, trainer = resolve_model(config.model), config.trainer
        config = config.model_copy(update={"model": model.section})
        loss = UnlearningLoss.build(trainer.handler, **trainer.method_args)
        plugins = Plugins.build(trainer.plugins, loss, use_lora=model.section.use_lora)
        args = training_arguments(
            trainer.args, output_dir=config.paths.output_dir, dtype=model.load_kwargs["dtype"],
            run_name=config.task_name,
        )  # fmt: skip
        trackers, args.report_to = args.report_to, []
        if not evaluate and args.eval_strategy == "no" and not args.eval_on_start:
            config = config.model_copy(update={"eval": {}})
        references = baselines.find(config)
        check_model(model, by=(loss.handler, *trainer.plugins))
        resume = None
        if not config.plan:
            unchecked = trainer.on_change == "resume"
            resume = checkpoint_to_resume(args, model.lineage, unchecked=unchecked)
        return cls(config, model, loss, plugins, args, trackers, references, resume)

    @property
    def folder(self) -> Path:
        return Path(self.config.paths.output_dir)

    @property
    def sections(self) -> dict[str, Any]:
        """The sections of the config that a run folder has as they are in effect."""
        return {"model": dict(self.config.model), "data": dict(self.config.data)}

    @property
    def batch_layout(self) -> dict[str, int]:
        """How the rows of a step are made up."""
        return {
            "rows": self.args.train_batch_size,
            "accumulation": self.args.gradient_accumulation_steps,
            "processes": self.args.world_size,
        }

    @property
    def effective_batch(self) -> int:
        return math.prod(self.batch_layout.values())

    def read_parts(
        self,
        tokenizer: PreTrainedTokenizerBase,
        parts: tuple[str, ...],
        record: Callable[[str, list[RowText]], object] | None = None,
    ) -> Parts:
        """Read and tokenise these parts of the data; ``record`` is given the texts."""
        config, chat = self.config, Chat(tokenizer, self.config.model.template_args)
        folder, seed = config.paths.datasets_dir, self.args.seed
        return load_parts(
            config.data, chat, parts, seed=seed, datasets_dir=folder,
            score_forget_end=config.trainer.score_forget_end, record=record,
        )  # fmt: skip

    def load_data(self) -> TrainingData:
        """Read the data; what they alone tell is filled into ``args``.

        Raises:
            InputError: something in the data can be put right.
        """
        config, args, settings = self.config, self.args, self.config.trainer.args
        refuse_own_model(config.paths.output_dir, self.model.lineage)
        tokenizer = load_tokenizer(self.model)
        self._check_method()
        read_key(key_file(self.folder))  # a damaged one is said before weights are loaded
        texts: dict[str, list[RowText]] = {}
        parts = self.read_parts(
            tokenizer, self._needed_parts, lambda part, new: texts.setdefault(part, []).extend(new)
        )
        set_warmup(args, settings, rows=len(parts))
        check_optimiser(args, rows=len(parts))
        if not (args.deepspeed or args.fsdp):
            self._decide_layout(parts)
        suites = build_suites(
            baselines.evaluated(config, self.references),
            tokenizer=tokenizer,
            template_args=config.model.template_args,
            datasets_dir=config.paths.datasets_dir,
        )
        panels = choose_best_by(args, settings, suites)
        sections = config.model_dump(include={"model", "trainer", "eval"})
        now = run_settings(sections, args, parts, content_of(self.model))
        resumed = resumption(self.resume, now, config.trainer.on_change)
        return TrainingData(parts, suites, panels, resumed, texts)

    def _check_method(self) -> None:
        """Raises InputError where the method lacks data, or chooses what it does not have."""
        if self.config.trainer.needs_alternates and not self.config.data.get("alternate"):
            raise InputError(
                "This trainer learns other plausible answers, but data.alternate is not set. Make "
                "them with `unlora alternates`, which says how to use them. For refusals set "
                "trainer=IdkDPO or trainer=IdkNLL."
            )
        if self.loss.handler in SUBTRACTED and self.args.load_best_model_at_end:
            raise InputError(
                f"{self.loss.handler} forgets when training is over; no checkpoint is the best. "
                "Leave out trainer.args.load_best_model_at_end."
            )

    @property
    def _needed_parts(self) -> tuple[str, ...]:
        parts = self.loss.parts
        looks_at_retain_once = self.plugins.start is not None or self.loss.handler == "PerTA"
        return (*parts, "retain") if looks_at_retain_once and "retain" not in parts else parts

    def _decide_layout(self, parts: Parts) -> None:
        """Choose the rows at once and gradient checkpointing, where they are ``auto``."""
        args, config = self.args, self.config
        sizes = {part: [*map(size_of, rows)] for part, rows in parts.rows.items()}
        layout = choose_layout(
            config,
            args,
            lambda rows: {part: largest(of_part, rows) for part, of_part in sizes.items()},
            lambda batches: estimate(config, batches, model=self.model),
            available=available_memory(args.device),
            architecture=self.model.architecture,
        )
        if layout is not None:
            args.per_device_train_batch_size = layout.rows
            args.gradient_accumulation_steps = layout.accumulation
            set_checkpointing(args, layout.checkpointing)
            logger.info("%s", layout.why)

    def load_model(self, parts: Parts) -> StartingModel:
        """Load the weights, and start the adapter."""
        args, dtype = self.args, self.model.load_kwargs["dtype"]
        if not self.model.section.use_lora and dtype in (torch.bfloat16, torch.float16):
            logger.warning(
                "All weights are trained in %s: steps of a small learning rate are lost in "
                "rounding. Set model.model_args.torch_dtype=float32.",
                dtype,
            )
        logger.info(
            "a step has %d rows: %d at once, in %d micro-batches, by %d processes",
            self.effective_batch, *self.batch_layout.values(),
        )  # fmt: skip
        set_seed(args.seed)
        network, tokenizer = get_model(self.model)
        penalty, vector, forget = None, None, self.loss.forget
        if forget is not None and self.loss.handler in SUBTRACTED:
            vector = TaskVector(network, forget)
        if self.plugins.start is not None:
            penalty = start_adapter(
                network, self.plugins.start, parts, pad_id=tokenizer.pad_token_id,
                batch_size=args.train_batch_size, seed=args.seed,
            )  # fmt: skip
        if self.plugins.orthogonal is not None:
            penalty = added(penalty, keep_orthogonal(network, self.plugins.orthogonal.weight))
        return StartingModel(network, tokenizer, penalty, vector)


def show_first_rows(plan: TrainingPlan) -> None:
    """Print how many rows each part of the data has, and the first of them as tokens."""
    tokenizer = load_tokenizer(plan.model)
    for name, rows in plan.read_parts(tokenizer, plan.loss.parts).rows.items():
        named = "train" if name == "retain" and not plan.config.data.get("retain") else name
        if is_main_process():
            print(as_lines(f"data.{named} ({len(rows)} rows)", pieces(tokenizer, rows[0])))
