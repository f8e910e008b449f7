"""Turn ``trainer.args`` of a config into Hugging Face's TrainingArguments."""

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cache, partial
from types import NoneType, UnionType
from typing import Any, Protocol, Union, get_args, get_origin

import torch
from huggingface_hub import HfApi
from torch import nn
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.training_args import ParallelMode
from transformers.utils import is_liger_kernel_available

from unlora.errors import InputError
from unlora.registry import unknown
from unlora.trainer.argument_table import IGNORED, ONLY, OURS
from unlora.trainer.trackers import check_installed

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
TRUE_TOO = ("resume_from_checkpoint", "fsdp")  # true is allowed, though they are declared as text
PRECISION = "ACCELERATE_MIXED_PRECISION"
BOTH_NAMES = ("gradient_checkpointing", "activation_checkpointing")
CHECKPOINTING = next(  # its name in the installed transformers
    name for name in reversed(BOTH_NAMES) if name in TrainingArguments.__dataclass_fields__
)
BY_METRIC = [kind for kind in SchedulerType if kind.value in ("reduce_lr_on_plateau", "greedy")]
logger = logging.getLogger(__name__)


def training_arguments(
    settings: Mapping[str, Any],
    *,
    output_dir: str,
    dtype: torch.dtype | str = torch.float32,
    run_name: str | None = None,
) -> TrainingArguments:
    """Check names and values, and fill in what depends on the machine.

    Args:
        settings: TrainingArguments, and ``warmup_epochs``; see :func:`set_warmup` for that.
        dtype: of the weights; bfloat16 weights train in bfloat16 where the device can.
        run_name: what trackers call the run, unless ``settings`` do.

    Raises:
        InputError: an unknown name, a value of a wrong type, one that TrainingArguments refuses, or
            a tracker that is not installed.
    """
    args = _accepted(settings)
    args["output_dir"] = output_dir
    args["remove_unused_columns"] = False
    if args.get("report_to") is None:
        args["report_to"] = "none"  # transformers 4 would report to whatever is installed
    if args.get("run_name") is None:
        args["run_name"] = run_name
    args.setdefault("log_level_replica", "error")  # the first process says it
    args["logging_nan_inf_filter"] = False  # it would log a loss of 0 where there is none
    if args.get("bf16") is None:
        gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        args["bf16"] = gpu and dtype == torch.bfloat16 and not args.get("fp16")
    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        args["use_cpu"] = True
        if args.get("dataloader_pin_memory") is None:
            args["dataloader_pin_memory"] = False
    if (precision := _precision_of_the_launcher()) is None:
        os.environ.pop(PRECISION, None)
    else:
        os.environ[PRECISION] = precision
    try:
        made = TrainingArguments(**args)
    except Exception as error:  # of whatever kind: it is about what was given
        raise InputError(f"trainer.args: {_sentence(error)}") from error
    check_installed(made.report_to)
    _check_machine(made)
    if made.n_gpu > 1:
        # Trainer would wrap the model in DataParallel, which splits a batch behind our back
        made._n_gpu = 1
        logger.warning("Of several GPUs one is used. Start with torchrun to use them all.")
    return made


def _accepted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of the given arguments goes to TrainingArguments."""
    # until it is known what the training needs
    settings = {k: True if k in BOTH_NAMES and v == "auto" else v for k, v in settings.items()}
    kinds = {field.name: field.type for field in fields(TrainingArguments) if field.init}
    known = {*kinds, *ONLY}
    numbers = dict.fromkeys(("warmup_epochs", "warmup_ratio"), float)
    wrong = []
    for key, value in settings.items():
        allowed = _refused(value, (kinds | numbers).get(key))
        if allowed and not (key in TRUE_TOO and isinstance(value, bool)):
            wrong.append(f"trainer.args.{key} is {value!r}; it must be {allowed}.")
        elif key in ONLY and value is not None and value not in ONLY[key][0]:
            wrong.append(f"trainer.args.{key} is {value!r}, but {ONLY[key][1]}. Leave it out.")
    if None not in (settings.get("warmup_steps"), settings.get("warmup_ratio")):
        wrong.append("Give one of trainer.args.warmup_steps and trainer.args.warmup_ratio.")
    if wrong:
        raise InputError("\n".join(wrong))
    args: dict[str, Any] = {}
    for key, value in with_one_checkpointing(settings).items():
        if key in TRUE_TOO and value is False:
            continue  # as if not given
        if key in IGNORED:
            logger.info("trainer.args.%s has no effect here", key)
        elif key not in known and key not in OURS:
            raise InputError(unknown("key of trainer.args", key, known | set(OURS)))
        elif key not in kinds or key in OURS:
            continue
        elif value is not None or NoneType in get_args(kinds[key]):  # else as if not given
            args[key] = value
    if args.get(CHECKPOINTING):
        # re-entrant checkpointing gives adapters no gradient unless the inputs require one
        args[f"{CHECKPOINTING}_kwargs"] = {
            "use_reentrant": False, **(args.get(f"{CHECKPOINTING}_kwargs") or {}),
        }  # fmt: skip
    return args


def with_one_checkpointing(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with ``gradient_checkpointing`` under the name that transformers has for it.

    From 5.23 on it is ``activation_checkpointing``. Where both are given, that counts: the other
    one has a default in the YAML.
    """
    args = dict(settings)
    for end in ("", "_kwargs"):
        names = [f"{name}{end}" for name in BOTH_NAMES]
        values = [args.pop(name) for name in names if args.get(name) is not None]
        if values:
            args[f"{CHECKPOINTING}{end}"] = values[-1]
    return args


def set_checkpointing(args: TrainingArguments, on: bool) -> None:
    """Switch gradient checkpointing on or off, under every name that it has."""
    for name in BOTH_NAMES:
        if hasattr(args, name):
            setattr(args, name, on)


def _check_machine(args: TrainingArguments) -> None:
    """Refuse what only this machine shows: precisions, packages, processes, the hub.

    Raises:
        InputError: something is not there.
    """
    if args.fp16 and args.device.type == "cpu":
        raise InputError(
            "trainer.args.fp16 is true, but the training would run on a processor, which has no "
            "float16 autocast. Leave it out, or set trainer.args.bf16=true."
        )
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise InputError(
            "trainer.args.fsdp splits weights over several processes, and this is one. Start with "
            "torchrun or accelerate launch, or leave it out."
        )
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise InputError(
            "trainer.args.use_liger_kernel is true, but liger-kernel is not installed. Run: pip "
            "install liger-kernel, or leave it out."
        )
    config = args.accelerator_config
    if config.split_batches or config.dispatch_batches or not config.even_batches:
        raise InputError(
            "trainer.args.accelerator_config may not set split_batches, dispatch_batches or "
            "even_batches: every process has its own rows of a batch, fixed by seed and epoch. "
            "Set global_batch_size for the rows of all processes."
        )
    if args.push_to_hub:
        try:
            HfApi().whoami(token=args.hub_token)
        except Exception as error:
            raise InputError(
                f"trainer.args.push_to_hub is true, but the hub does not take it: "
                f"{_sentence(error)} Log in with: hf auth login, or leave it out."
            ) from error


def _sentence(error: Exception) -> str:
    """What a library says is wrong, in one line."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if words.endswith((".", "!", "?")) else f"{words}."


def check_optimiser(args: TrainingArguments, rows: int) -> None:
    """Make the optimiser and the schedule once, for a few numbers, before any weights are loaded.

    Args:
        rows: of an epoch.

    Raises:
        InputError: the library refuses a setting or lacks a package, or no step would be made.
    """
    steps = steps_per_epoch(args, rows)
    if steps == 0:
        raise InputError(
            f"No step would be made: an epoch has {rows} rows, a batch of all processes "
            f"{args.train_batch_size * args.world_size}, and trainer.args.dataloader_drop_last "
            "leaves out a batch that is not full. Set it to false, or "
            "trainer.args.per_device_train_batch_size lower."
        )
    total = args.max_steps if args.max_steps > 0 else math.ceil(steps * args.num_train_epochs)
    weight = nn.Linear(2, 2, device=args.device)
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, weight)
        if args.optim_target_modules:
            return  # of the model that is not there yet
        optimizer = kind(weight.parameters(), **settings)
        schedule = get_scheduler(
            args.lr_scheduler_type, optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(total), num_training_steps=total,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )  # fmt: skip
        weight.weight.sum().backward()
        optimizer.step()
        if args.lr_scheduler_type not in BY_METRIC:
            schedule.step()
    except Exception as error:  # of whatever kind: it is about what was given
        if args.optim_target_modules and not isinstance(error, ImportError):
            return
        raise InputError(
            f"trainer.args: no optimiser {args.optim.value} with schedule "
            f"{args.lr_scheduler_type.value} can be made: {_sentence(error)}"
        ) from error


@cache
def _precision_of_the_launcher() -> str | None:
    """What ``accelerate launch`` has set for this process.

    transformers 4 writes there what a run asks for, and takes it for what the next one in this
    process asks for.
    """
    return os.environ.get(PRECISION)


def _refused(value: Any, annotation: Any) -> str | None:
    """What a value must be, if it is not of the plain types that an annotation names."""
    union = get_origin(annotation) in (Union, UnionType)
    kinds = get_args(annotation) if union else (annotation,)
    if value is None or not {*KINDS, NoneType}.issuperset(kinds):
        return None
    if type(value) in kinds or (type(value) is int and float in kinds):
        return None
    return " or ".join(words for kind, words in KINDS.items() if kind in kinds)


def steps_per_epoch(args: TrainingArguments, rows: int) -> int:
    """Optimiser steps of an epoch, as the trainer counts them.

    ``rows`` are split over all processes, in batches, in groups of the accumulation.
    """
    share = rows / (args.per_device_train_batch_size * max(1, args.world_size))
    batches = math.floor(share) if args.dataloader_drop_last else math.ceil(share)
    return math.ceil(batches / args.gradient_accumulation_steps)


def set_warmup(args: TrainingArguments, settings: Mapping[str, Any], rows: int) -> None:
    """Turn ``warmup_epochs`` or ``warmup_ratio`` into optimiser steps.

    ``warmup_epochs`` has a default in the YAML; a given ``warmup_steps`` or ``warmup_ratio`` wins.

    Args:
        rows: of an epoch.
    """
    per_epoch = steps_per_epoch(args, rows)
    if settings.get("warmup_steps") is not None:
        return
    if settings.get("warmup_ratio") is not None:
        total = args.max_steps if args.max_steps > 0 else per_epoch * args.num_train_epochs
        args.warmup_steps = math.ceil(settings["warmup_ratio"] * total)
    elif settings.get("warmup_epochs") is not None:
        args.warmup_steps = round(settings["warmup_epochs"] * per_epoch)


class Suite(Protocol):
    """As far as training needs an evaluation suite."""

    @property
    def metrics(self) -> Mapping[str, bool]:
        """Metric -> whether higher is better."""
        ...

    @property
    def not_computable(self) -> Mapping[str, str]:
        """Metric -> what it lacks, in words."""
        ...

    def evaluate(self, model: Any, *, panel: bool, also: Sequence[str]) -> dict[str, float]: ...


def choose_best_by(
    args: TrainingArguments, settings: Mapping[str, Any], suites: Sequence[Suite]
) -> list[Callable]:
    """The cheap evaluations that run during training, with the metric that chooses the best.

    ``metric_for_best_model`` may be any metric of a suite, with or without ``eval_``; which end is
    better is known from the metric unless ``greater_is_better`` says so.

    Raises:
        InputError: the best checkpoint is wanted by no metric, or by one that no suite has.
    """
    also: list[str] = []
    follows = args.lr_scheduler_type in BY_METRIC or args.save_strategy == "best"
    wants = args.load_best_model_at_end or follows
    if wants or args.metric_for_best_model not in (None, "loss"):
        directions = {name: up for suite in suites for name, up in suite.metrics.items()}
        wanted = str(args.metric_for_best_model or "loss").removeprefix("eval_")
        if not directions or (settings.get("metric_for_best_model") is None and wanted == "loss"):
            hint = f" Known: {', '.join(sorted(directions))}." if directions else ""
            raise InputError(
                "The best checkpoint, and a schedule that follows a metric, go by one of an "
                "evaluation suite. Set eval=SUITE "
                f"and trainer.args.metric_for_best_model=NAME.{hint}"
            )
        if wanted not in directions:
            raise InputError(unknown("metric_for_best_model", wanted, directions))
        for suite in suites:
            if wanted in suite.not_computable:
                raise InputError(
                    f"metric_for_best_model is {wanted}, which will have no value: "
                    f"{suite.not_computable[wanted]}."
                )
        also = [wanted]
        args.metric_for_best_model = f"eval_{wanted}"
        if settings.get("greater_is_better") is None:
            # Trainer guesses "greater" for every name that does not end in loss
            args.greater_is_better = directions[wanted]
    return [
        partial(suite.evaluate, panel=True, also=[name for name in also if name in suite.metrics])
        for suite in suites
    ]
