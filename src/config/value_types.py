"""Declare types of single config values, each with its pydantic validator."""

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from unlora.registry import unknown
from unlora.runs.redaction import redacted

DTYPES = ("auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16")
DEVICE_MAP = re.compile(r"auto|balanced|balanced_low_0|sequential|cpu|mps|cuda(:\d+)?")


def _dtype(value: Any) -> Any:
    # a torch.dtype is recognised by its name: importing torch takes seconds
    name = value if isinstance(value, str) else str(value).removeprefix("torch.")
    if value is not None and name not in DTYPES:
        raise ValueError(unknown("dtype", name, DTYPES))
    return value


def _device_map(value: Any) -> Any:
    if isinstance(value, (dict, type(None))):
        return value
    if not (isinstance(value, str) and DEVICE_MAP.fullmatch(value)):
        raise ValueError(
            "it must be auto, balanced, balanced_low_0, sequential, cpu, mps, cuda, cuda:NUMBER, "
            "null, or a section of module names."
        )
    return value


def _one_or_several(kind: type, words: str) -> AfterValidator:
    def check(value: Any) -> Any:
        values = value if isinstance(value, list) else [value]
        if value is not None and not all(type(item) is kind for item in values):
            raise ValueError(f"it must be {words}, or a list of them.")
        return value

    return AfterValidator(check)


def _target_modules(value: Any) -> Any:
    named = isinstance(value, list) and value and all(isinstance(name, str) for name in value)
    if not named and not (isinstance(value, str) and value):
        raise ValueError(
            "it must be a list of module names, a regular expression, or all-linear: "
            "target_modules='[q_proj,v_proj]'."
        )
    return value


def _bias(value: Any) -> Any:
    if value != "none":
        raise ValueError(
            "the reference is this model with its adapter off, and trained biases would stay on. "
            "Set model.lora_config.bias=none."
        )
    return value


def _modules_to_save(value: Any) -> Any:
    if value:
        raise ValueError(
            "the reference is this model with its adapter off, and a trained copy of a whole "
            "module would stay on. Name the modules in target_modules instead."
        )
    return value


def _init_lora_weights(value: Any) -> Any:
    if value is not True and value not in ("gaussian", "orthogonal", "pissa", "olora"):
        raise ValueError(
            "training starts from the reference, which is this model with its adapter off, and "
            "such a start rewrites the weights below or changes the answers. Choose one of: true, "
            "gaussian, orthogonal, pissa, olora."
        )
    return value


def _use_safetensors(value: bool) -> bool:
    if not value:
        raise ValueError(
            "weights that are pickled can run code when they are read. Leave it out, and take "
            "weights that are safetensors."
        )
    return value


def _token(value: Any) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # one of digits is read as a number
    if not isinstance(value, (str, bool, type(None))):
        raise ValueError("it must be text. Better log in with `hf auth login`, or set HF_TOKEN.")
    return value


def _task_name(value: Any) -> Any:
    if isinstance(value, float):
        raise ValueError("it is a number, which may not be what was written. Put it in quotes.")
    return str(value) if type(value) is int else value


def _inside_saves(value: str) -> str:
    if any(part.strip() in ("", ".", "..") for part in value.split("/")):
        raise ValueError("it must name a folder below saves/<mode>. Give task_name=NAME.")
    return _no_secret(value)


def _no_secret(value: str) -> str:
    if redacted(value) != value:
        raise ValueError("it holds a secret, and folders and logs would be called so.")
    return value


def _own_folder(value: str) -> str:
    # the folder of an earlier run is moved aside as a whole
    folder, others = os.path.realpath(value), map(Path, (os.curdir, os.path.expanduser("~")))
    if Path(value).name in ("", "..") or any(p.resolve().is_relative_to(folder) for p in others):
        raise ValueError("a run needs a folder of its own. Give paths.output_dir=FOLDER.")
    if value.startswith("~"):
        raise ValueError("~ is not the home folder here. Write $HOME, outside of quotes.")
    return _no_secret(value)


def _folder(value: str | None) -> str | None:
    if value is not None and not os.path.isdir(value):
        raise ValueError("there is no such folder.")
    return value


def _prompt(value: str | None) -> str | None:
    named = re.findall(r"\{(\w+)\}", value or "{question}")
    for name in named:
        if name not in ("question", "answer"):
            raise ValueError(unknown("name in alternates.prompt", name, ("question", "answer")))
    if "question" not in named:
        raise ValueError("it must hold {question}, or be null: then the question alone is asked.")
    return value


def _max_steps(value: int) -> int:
    if value != -1 and value <= 0:
        raise ValueError("it must be above 0, or -1 for no limit: nothing would be trained.")
    return value


def _checkpointing(value: Any) -> Any:
    if value not in (True, False, None, "auto") or isinstance(value, float):
        raise ValueError("it must be true, false, or auto: on where memory would not do without.")
    return value


def _batch_size(value: Any) -> Any:
    if value == "auto":
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("it must be a whole number, or auto: as many rows as memory allows.")
    if value < 1:
        raise ValueError("it must be greater than 0, or auto: as many rows as memory allows.")
    return value


Count = Annotated[int, Field(gt=0)]
BatchSize = Annotated[Any, AfterValidator(_batch_size)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Steps = Annotated[float, Field(gt=0)]  # below 1 they are a share of all
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # numpy's
Dtype = Annotated[Any, AfterValidator(_dtype)]
DeviceMap = Annotated[Any, AfterValidator(_device_map)]
Token = Annotated[Any, AfterValidator(_token)]
UseSafetensors = Annotated[bool, AfterValidator(_use_safetensors)]
TargetModules = Annotated[Any, AfterValidator(_target_modules)]
ModuleNames = Annotated[Any, _one_or_several(str, "a module name")]
ParameterNames = Annotated[Any, _one_or_several(str, "a parameter name")]
Names = Annotated[Any, _one_or_several(str, "a name")]
LayerNumbers = Annotated[Any, _one_or_several(int, "a whole number")]
Bias = Annotated[Any, AfterValidator(_bias)]
ModulesToSave = Annotated[Any, AfterValidator(_modules_to_save)]
InitLoraWeights = Annotated[Any, AfterValidator(_init_lora_weights)]
Prompt = Annotated[str | None, AfterValidator(_prompt)]
MaxSteps = Annotated[int, AfterValidator(_max_steps)]
Checkpointing = Annotated[Any, AfterValidator(_checkpointing)]
OwnFolder = Annotated[str, AfterValidator(_own_folder)]
ExistingFolder = Annotated[str | None, AfterValidator(_folder)]
TaskName = Annotated[str, BeforeValidator(_task_name), AfterValidator(_inside_saves)]
