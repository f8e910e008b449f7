"""``trainer.args`` of a config as Hugging Face's TrainingArguments."""

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cache, partial
from types import NoneType, UnionType
from typing import Any, Protocol, Union, get_args, get_origin

import torch
from transformers import TrainingArguments

from unlora.errors import InputError
from unlora.registry import unknown
from unlora.trainer.trackers import check_installed

# configs of Open-Unlearning set these; the installed transformers may no longer know them
IGNORED = (
    "logging_dir", "overwrite_output_dir", "save_safetensors", "do_train", "do_eval",
    # rows are encoded before; a worker would end with a SIGTERM to all, ahead of the checkpoint
    "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_prefetch_factor",
)  # fmt: skip
OURS = ("warmup_epochs", "warmup_ratio")
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
TRUE_TOO = ("resume_from_checkpoint", "fsdp")  # true is allowed, though they are declared as text
PRECISION = "ACCELERATE_MIXED_PRECISION"
logger = logging.getLogger(__name__)


def training_arguments(
    given: Mapping[str, Any],
    *,
    output_dir: str,
    dtype: torch.dtype | str = torch.float32,
    run_name: str | None = None,
) -> TrainingArguments:
    """Check names and values, and fill in what depends on the machine.

    Args:
        given: TrainingArguments, and ``warmup_epochs``; see :func:`set_warmup` for that.
        dtype: of the weights; bfloat16 weights train in bfloat16 where the device can.
        run_name: what trackers call the run, unless ``given`` does.

    Raises:
        InputError: an unknown name, a value of a wrong type, one that TrainingArguments refuses, or
            a tracker that is not installed.
    """
    kinds = {field.name: field.type for field in fields(TrainingArguments) if field.init}
    known = set(kinds)
    kinds |= dict.fromkeys(OURS, float)
    wrong = [
        f"trainer.args.{key} is {value!r}; it must be {allowed}."
        for key, value in given.items()
        if (allowed := _refused(value, kinds.get(key))) and not (key in TRUE_TOO and value is True)
    ]
    if wrong:
        raise InputError("\n".join(wrong))
    if None not in (given.get("warmup_steps"), given.get("warmup_ratio")):
        raise InputError("Give one of trainer.args.warmup_steps and trainer.args.warmup_ratio.")
    args = {}
    for key, value in given.items():
        if value is None and key in known and NoneType not in get_args(kinds[key]):
            continue  # as if it were not given
        if key in known and not (key in OURS or key in IGNORED):
            args[key] = value
        elif key in IGNORED:
            logger.info("trainer.args.%s has no effect here", key)
        elif key not in OURS:
            raise InputError(unknown("key of trainer.args", key, known | set(OURS)))
    args["output_dir"] = output_dir
    args["remove_unused_columns"] = False
    if args.get("report_to") is None:
        args["report_to"] = "none"  # transformers 4 would report to whatever is installed
    if args.get("run_name") is None:
        args["run_name"] = run_name
    args.setdefault("log_level_replica", "error")  # the first process says it
    args["logging_nan_inf_filter"] = False  # it would log a loss of 0 where there is none
    if args.get("gradient_checkpointing"):
        # re-entrant checkpointing gives adapters no gradient unless the inputs require one
        args.setdefault("gradient_checkpointing_kwargs", {"use_reentrant": False})
    if args.get("bf16") is None:
        gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        args["bf16"] = gpu and dtype == torch.bfloat16 and not args.get("fp16")
    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        args["use_cpu"] = True
        if args.get("dataloader_pin_memory") is None:
            args["dataloader_pin_memory"] = False
    if args.get("label_smoothing_factor"):
        raise InputError("trainer.args.label_smoothing_factor has no effect on these objectives.")
    if (precision := _precision_of_the_launcher()) is None:
        os.environ.pop(PRECISION, None)
    else:
        os.environ[PRECISION] = precision
    try:
        made = TrainingArguments(**args)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"trainer.args: {' '.join(str(error).split())}") from error
    check_installed(made.report_to)
    if made.n_gpu > 1:
        # Trainer would wrap the model in DataParallel, which splits a batch behind our back
        made._n_gpu = 1
        logger.warning("Of several GPUs one is used. Start with torchrun to use them all.")
    return made


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


def set_warmup(args: TrainingArguments, given: Mapping[str, Any], rows: int) -> None:
    """Turn ``warmup_epochs`` or ``warmup_ratio`` into optimiser steps.

    ``warmup_epochs`` has a default in the YAML; a given ``warmup_steps`` or ``warmup_ratio`` wins.
    Steps are counted as the trainer counts them: ``rows`` split over all processes, in batches,
    in groups of the accumulation.
    """
    batches = math.ceil(rows / (args.per_device_train_batch_size * max(1, args.world_size)))
    steps_per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    if given.get("warmup_steps") is not None:
        return
    if given.get("warmup_ratio") is not None:
        total = args.max_steps if args.max_steps > 0 else steps_per_epoch * args.num_train_epochs
        args.warmup_steps = math.ceil(given["warmup_ratio"] * total)
    elif given.get("warmup_epochs") is not None:
        args.warmup_steps = round(given["warmup_epochs"] * steps_per_epoch)


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
    args: TrainingArguments, given: Mapping[str, Any], suites: Sequence[Suite]
) -> list[Callable]:
    """The cheap evaluations that run during training, with the metric that chooses the best.

    ``metric_for_best_model`` may be any metric of a suite, with or without ``eval_``; which end is
    better is known from the metric unless ``greater_is_better`` says so.

    Raises:
        InputError: the best checkpoint is wanted by no metric, or by one that no suite has.
    """
    also: list[str] = []
    if args.load_best_model_at_end or args.metric_for_best_model not in (None, "loss"):
        directions = {name: up for suite in suites for name, up in suite.metrics.items()}
        wanted = str(args.metric_for_best_model or "loss").removeprefix("eval_")
        if not directions or (given.get("metric_for_best_model") is None and wanted == "loss"):
            hint = f" Known: {', '.join(sorted(directions))}." if directions else ""
            raise InputError(
                "The best checkpoint is chosen by a metric of an evaluation suite. Set eval=SUITE "
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
        if given.get("greater_is_better") is None:
            # Trainer guesses "greater" for every name that does not end in loss
            args.greater_is_better = directions[wanted]
    return [
        partial(suite.evaluate, panel=True, also=[name for name in also if name in suite.metrics])
        for suite in suites
    ]
