"""Check more than one key of a config: data files, and settings that do not go together."""

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from unlora.config.schema import Config, DataKeys, TrainerArgs, TrainerSection
from unlora.config.unused_keys import READ_DATA
from unlora.errors import InputError
from unlora.registry import unknown

ROWS_AT_ONCE = 4  # where nobody has said how many; on a processor more are not faster
OWN_DATA = READ_DATA["eval"]  # data.* that may be a file, to be evaluated on
# what a folder of `datasets` or of the hub has in it
OF_DATASETS = ("state.json", "dataset_dict.json", "train*.*", "data/train*.*")


def with_data_sets(content: Mapping[str, Any]) -> dict[str, Any]:
    """The section ``data`` with a data set in place of each file of the user's that is trained on.

    The suite ``own`` refers to the files in its own section; an evaluation has no other data.

    Raises:
        InputError: they are no files, or what is evaluated has nothing to do with them.
    """
    data, evaluates = content["data"], content.get("mode") == "eval"
    files = {key: data[key] for key in data if isinstance(data[key], str) and key != "anchor"}
    if isinstance(data.get("train"), list):
        files["train"] = data["train"]
    if evaluates:
        files |= {key: data[key] for key in OWN_DATA if key in data}
    mistakes = [*_neither_file_nor_section(data), *_wrong_files(files, content)]
    if mistakes:
        raise InputError("\n".join(mistakes))
    if evaluates:
        return {key: value for key, value in data.items() if key not in files}
    # what only the evaluation after a training asks about is no data of the training
    named = {key: value for key, value in data.items() if key != "holdout"}
    return {key: _as_data_set(v, content) if key in files else v for key, v in named.items()}


def _neither_file_nor_section(data: Mapping[str, Any]) -> Iterator[str]:
    for key, value in data.items():
        kinds = (str, Mapping, list if key == "train" else type(None), type(None))
        if key in DataKeys.__annotations__ and key != "anchor" and not isinstance(value, kinds):
            yield (
                f"data.{key} is {value!r}; it must be one file of questions and answers, or a "
                "section of data sets."
            )


def _wrong_files(files: Mapping[str, Any], content: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each file that is none, or that this run has no use for."""
    evaluates, suites = content.get("mode") == "eval", content.get("eval") or {}
    benchmarks = [] if "own" in suites else list(suites)
    for key, file in files.items():
        if benchmarks and not evaluates:
            yield (
                f"data.{key} is {file!r} (text), but {benchmarks[0]} is a benchmark. Files are for "
                f"{_own_experiment(content)}. In this experiment, choose a data set with "
                f"data/datasets@data.{key}=NAME and set "
                f"data.{key}.NAME.args.hf_args.path={file}"
            )
        elif evaluates and key not in OWN_DATA:
            yield unknown("key of data in an evaluation", key, OWN_DATA)
        elif evaluates and file is not None and "own" not in suites:
            yield f"data.{key} is set, but the suite own is not chosen. Give eval=own."
        elif file is not None and (mistake := _file_mistake(file)):
            yield f"data.{key} is {file!r}{mistake}"


def _as_data_set(file: Any, content: Mapping[str, Any]) -> dict[str, Any]:
    keys = {key: content[key] for key in ("question_key", "answer_key") if content.get(key)}
    paths = file if isinstance(file, list) else [file]
    return {
        f"own{number or ''}": {"handler": "QADataset", "args": {"hf_args": {"path": path}, **keys}}
        for number, path in enumerate(paths)
    }


def _own_experiment(content: Mapping[str, Any]) -> str:
    mode = content.get("mode")
    return f"experiment={'finetune' if mode == 'finetune' else 'unlearn'}/own/lora"


def _file_mistake(file: Any) -> str | None:
    if isinstance(file, list) and file:  # of data.train
        return next(filter(None, map(_file_mistake, file)), None)
    if not isinstance(file, str):
        return "; it must be one file of questions and answers."
    path = Path(file)
    if path.is_dir() and not any(next(path.glob(made), None) for made in OF_DATASETS):
        return (
            ", which is a folder. Give one file: .jsonl, .json, .csv or .parquet; or a folder that "
            "`datasets` has written."
        )
    if path.is_dir():
        return None
    if path.exists():
        return None if path.is_file() else ", which is no file. Give one of .jsonl, .json, .csv."
    others = [other.name for other in path.parent.glob("*")]
    near = difflib.get_close_matches(path.name, others, n=1)
    return ", but there is no such file." + (f" Did you mean {near[0]!r}?" if near else "")


def contradictions(config: Config) -> list[str]:
    """The settings of a config that do not go together, a sentence each."""
    mistakes = [*_eval_contradictions(config)]
    if config.mode != "eval":
        mistakes += _unknown_arguments(config.trainer.args)
        mistakes += _training_contradictions(config)
    return mistakes


def _eval_contradictions(config: Config) -> Iterator[str]:
    run = config.paths.output_dir
    for suite, settings in config.eval.items():
        log = str(settings.get("output_dir") or "")
        if config.mode == "eval" and log and not _is_inside(log, run):
            yield (
                f"eval.{suite}.output_dir is {log!r}, which is not in the run folder {run!r}. Set "
                "paths.output_dir instead."
            )
        if not settings.get("handler"):
            yield f"eval.{suite} is set, but that suite is not chosen. Give eval={suite}."
    if config.mode == "eval" and not config.eval:
        yield "mode is eval, but no suite is chosen. Give eval=tofu."


def _is_inside(path: str, folder: str) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _training_contradictions(config: Config) -> Iterator[str]:
    data, trainer, folder = config.data, config.trainer, config.paths.output_dir
    output_dir = trainer.args.get("output_dir")
    if output_dir is not None and Path(str(output_dir)) != Path(folder):
        yield (
            f"trainer.args.output_dir is {output_dir!r}, but the run goes to paths.output_dir, "
            f"which is {folder!r}. Set paths.output_dir instead."
        )
    if not trainer.handler:
        yield f"mode is {config.mode}, but there is no trainer. Give trainer=NAME."
        return
    finetunes = trainer.handler == "FinetuneTrainer"
    if finetunes != (config.mode == "finetune"):
        yield (
            f"mode is {config.mode}, but trainer.handler is {trainer.handler}. Use "
            "--config-name=train with experiment=finetune/..., --config-name=unlearn with "
            "experiment=unlearn/... and trainer=NAME."
        )
    part = "train" if finetunes else "forget"
    if not data.get(part):
        yield f"data.{part} is not set. Add it with data/datasets@data.{part}=NAME."
    alpha = trainer.method_args.get("alpha")
    if alpha and not finetunes and not (data.get("retain") or data.get("train")):
        yield (
            f"trainer.method_args.alpha is {alpha}, but data.retain is not set. Add it with "
            "data/datasets@data.retain=NAME, or set trainer.method_args.alpha=0."
        )


def _unknown_arguments(args: Mapping[str, Any]) -> list[str]:
    """Keys of ``trainer.args`` that no version of TrainingArguments or of ours had.

    The names are read from the file of transformers, whose import takes seconds; the trainer checks
    them again, and what they are set to.
    """
    known = _declared_arguments()
    wrong = [key for key in args if known and key not in known]
    return [unknown("key of trainer.args", key, known) for key in wrong]


@cache
def _declared_arguments() -> frozenset[str]:
    try:
        file = distribution("transformers").locate_file("transformers/training_args.py")
        text = Path(str(file)).read_text("utf-8")
    except (PackageNotFoundError, OSError):
        return frozenset()
    declared = re.findall(r"^    (\w+): ", text, re.MULTILINE)
    ours = (*TrainerArgs.__annotations__, "logging_dir", "overwrite_output_dir", "do_train",
            "do_eval", "save_safetensors")  # fmt: skip
    return frozenset((*declared, *ours)) if "learning_rate" in declared else frozenset()


def check_share(rows: int | None, processes: int) -> Iterator[str]:
    """Yield a sentence where the rows of a step cannot be shared evenly by the processes."""
    if rows is not None and rows % processes:
        less = rows - rows % processes
        near = [str(number) for number in (less, less + processes) if number]
        yield (
            f"global_batch_size is {rows}, which {processes} processes cannot share evenly. Set "
            f"global_batch_size={' or '.join(near)}, or start another number of processes."
        )


def with_rows_at_once(trainer: TrainerSection) -> TrainerSection:
    """The section with a number for ``auto``, which is kept aside for what knows the memory."""
    if trainer.args.get("per_device_train_batch_size") != "auto":
        return trainer
    args = {**trainer.args, "per_device_train_batch_size": ROWS_AT_ONCE}
    return trainer.model_copy(update={"args": args, "batch_is_auto": True})


def with_share(args: TrainerArgs, rows: int, processes: int) -> TrainerArgs:
    """``trainer.args`` with which a step of all processes has this many rows.

    ``per_device_train_batch_size`` is what fits into memory: a micro-batch is as large as divides
    a process's rows, and no larger than that.
    """
    share, most = rows // processes, args.get("per_device_train_batch_size", 8)
    size = next(n for n in range(min(share, most), 0, -1) if share % n == 0)
    layout = {"per_device_train_batch_size": size, "gradient_accumulation_steps": share // size}
    return {**args, **layout}  # type: ignore[typeddict-item]
