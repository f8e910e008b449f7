"""The typed sections of a config: which keys there are, and what may stand in them.

Every key that a user can mistype is known here, so a typo ends in a sentence and not in a run with
another setting than the one asked for. Mistakes are reported together, before anything heavy is
imported. Sections hold the keys that were given and no others: defaults stand in ``configs/`` or in
the signature of the function that takes the value.

The file is long because it is one table: a key looked up here is found at once or does not exist.
"""

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import resources
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Annotated, Any, Literal, Required, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    with_config,
)
from typing_extensions import TypedDict

from unlora.config.unused_keys import referred, refuse_unread
from unlora.errors import InputError
from unlora.registry import unknown
from unlora.runs.redaction import HIDDEN, is_secret, redacted, without_secrets, without_setting

STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
DTYPES = ("auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16")
OWN_DATA = ("forget", "retain", "holdout")  # data.* that may be a file, to be evaluated on
# what a folder of `datasets` or of the hub has in it
OF_DATASETS = ("state.json", "dataset_dict.json", "train*.*", "data/train*.*")
DEVICE_MAP = re.compile(r"auto|balanced|balanced_low_0|sequential|cpu|mps|cuda(:\d+)?")
Count = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]
Steps = Annotated[float, Field(gt=0)]  # below 1 they are a share of all
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # numpy's


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


def _one_dtype(args: dict[str, Any]) -> dict[str, Any]:
    # torch_dtype has a default in every YAML, so a dtype was asked for
    dtype = args.pop("dtype", None)
    return args if dtype is None else {**args, "torch_dtype": dtype}


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
    above = (Path(place).resolve() for place in (os.curdir, os.path.expanduser("~")))
    real = Path(os.path.realpath(value))
    if Path(value).name in ("", "..") or any(real in (one, *one.parents) for one in above):
        raise ValueError("a run needs a folder of its own. Give paths.output_dir=FOLDER.")
    if value.startswith("~"):
        raise ValueError("~ is not the home folder here. Write $HOME, outside of quotes.")
    return _no_secret(value)


def _folder(value: str | None) -> str | None:
    if value is not None and not os.path.isdir(value):
        raise ValueError("there is no such folder.")
    return value


@with_config(STRICT)
class ModelArgs(TypedDict, total=False):
    """Keyword arguments of ``from_pretrained``."""

    pretrained_model_name_or_path: Required[str]
    torch_dtype: Annotated[Any, AfterValidator(_dtype)]
    dtype: Annotated[Any, AfterValidator(_dtype)]
    attn_implementation: str | None
    device_map: Annotated[Any, AfterValidator(_device_map)]
    max_memory: Any
    quantization_config: dict[str, Any] | None
    low_cpu_mem_usage: bool
    trust_remote_code: bool
    revision: str | None
    subfolder: str | None
    variant: str | None
    token: Annotated[Any, AfterValidator(_token)]
    cache_dir: str | None
    local_files_only: bool
    use_safetensors: Annotated[bool, AfterValidator(_use_safetensors)]
    use_cache: bool
    rope_scaling: dict[str, Any] | None


@with_config(STRICT)
class TokenizerArgs(TypedDict, total=False):
    pretrained_model_name_or_path: str | None
    trust_remote_code: bool
    revision: str | None
    subfolder: str | None
    token: Annotated[Any, AfterValidator(_token)]
    cache_dir: str | None
    local_files_only: bool
    use_fast: bool
    legacy: bool
    padding_side: Literal["left", "right"]
    model_max_length: Count
    add_bos_token: bool
    add_eos_token: bool


@with_config(STRICT)
class TemplateArgs(TypedDict, total=False):
    apply_chat_template: bool
    system_prompt: str | None
    system_prompt_with_special_tokens: str | None
    user_start_tag: str | None
    user_end_tag: str | None
    asst_start_tag: str | None
    asst_end_tag: str | None
    date_string: str | None
    chat_template_kwargs: dict[str, Any] | None  # variables of the template: enable_thinking


@with_config(STRICT)
class LoraKeys(TypedDict, total=False):
    """Keyword arguments of ``peft.LoraConfig`` under which switching off gives the reference."""

    r: Count
    lora_alpha: Annotated[float, Field(gt=0)]
    lora_dropout: Share
    target_modules: Annotated[Any, AfterValidator(_target_modules)]
    exclude_modules: Annotated[Any, _one_or_several(str, "a module name")]
    bias: Annotated[Any, AfterValidator(_bias)]
    task_type: Literal["CAUSAL_LM"]
    modules_to_save: Annotated[Any, AfterValidator(_modules_to_save)]
    init_lora_weights: Annotated[Any, AfterValidator(_init_lora_weights)]
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    layers_to_transform: Annotated[Any, _one_or_several(int, "a whole number")]
    layers_pattern: Annotated[Any, _one_or_several(str, "a name")]
    target_parameters: Annotated[Any, _one_or_several(str, "a parameter name")]
    rank_pattern: dict[str, Count]
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]]


@with_config(STRICT)
class HubArgs(TypedDict, total=False):
    """Arguments of ``unlora.data.rows.load_rows``."""

    path: Required[str]
    name: str | None
    split: str | None
    data_files: str | list[str] | None
    revision: str | None
    token: Annotated[Any, AfterValidator(_token)]


@with_config(STRICT)
class DatasetArgs(TypedDict, total=False):
    hf_args: Required[HubArgs]
    question_key: str
    answer_key: str
    text_key: str
    max_length: Annotated[int, Field(gt=1)]
    idk_path: str | None


@with_config(STRICT)
class DatasetKeys(TypedDict):
    handler: str
    args: DatasetArgs


@with_config(STRICT)
class DataKeys(TypedDict, total=False):
    anchor: Literal["forget", "retain"]
    train: dict[str, DatasetKeys | None] | None
    forget: dict[str, DatasetKeys | None] | None
    retain: dict[str, DatasetKeys | None] | None
    alternate: dict[str, DatasetKeys | None] | None


def _prompt(value: str | None) -> str | None:
    named = re.findall(r"\{(\w+)\}", value or "{question}")
    for name in named:
        if name not in ("question", "answer"):
            raise ValueError(unknown("name in alternates.prompt", name, ("question", "answer")))
    if "question" not in named:
        raise ValueError("it must hold {question}, or be null: then the question alone is asked.")
    return value


@with_config(STRICT)
class AlternatesKeys(TypedDict, total=False):
    """How other answers to the forget questions are made; see ``unlora.recipes.alternates``."""

    repeats: Count
    tries: Count
    temperature: Annotated[float, Field(gt=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    max_new_tokens: Count
    batch_size: Count
    seed: Seed
    prompt: Annotated[str | None, AfterValidator(_prompt)]
    voice: Literal["model", "root"]


@with_config(STRICT)
class CollatorArgs(TypedDict, total=False):
    padding_side: Literal["right"]  # no score depends on the side


@with_config(STRICT)
class CollatorKeys(TypedDict, total=False):
    handler: str
    args: CollatorArgs


class Section(BaseModel):
    model_config = STRICT


class ModelSection(Section):
    """What ``get_model`` reads; ``targets`` are published models that experiments refer to."""

    model_args: Annotated[ModelArgs, AfterValidator(_one_dtype)]
    tokenizer_args: TokenizerArgs = Field(default_factory=TokenizerArgs)
    template_args: TemplateArgs = Field(default_factory=TemplateArgs)
    use_lora: bool = False
    lora_config: LoraKeys
    lineage: Literal["auto", "stack", "merge", "continue"] = "auto"
    quantisation: Literal["nf4", "int8"] | None = None  # of the base weights, as they are loaded
    base: str | None = None  # the model that an adapter is on, where the one it names is not there
    as_trained: bool = False  # what is not set is as it was trained: model.run_defaults
    targets: dict[str, Any] = Field(default_factory=dict)


def _max_steps(value: int) -> int:
    if value != -1 and value <= 0:
        raise ValueError("it must be above 0, or -1 for no limit: nothing would be trained.")
    return value


def _checkpointing(value: Any) -> Any:
    if value not in (True, False, None, "auto") or isinstance(value, float):
        raise ValueError("it must be true, false, or auto: on where memory would not do without.")
    return value


@with_config(ConfigDict(extra="allow", strict=True, allow_inf_nan=False))
class TrainerArgs(TypedDict, total=False):
    """Those with a range; ``unlora.trainer`` checks all names against the TrainingArguments."""

    per_device_train_batch_size: Count
    per_device_eval_batch_size: Count
    gradient_accumulation_steps: Count
    num_train_epochs: Annotated[float, Field(gt=0)]
    max_steps: Annotated[int, AfterValidator(_max_steps)]
    learning_rate: NotNegative
    weight_decay: NotNegative
    adam_beta1: Share
    adam_beta2: Share
    adam_epsilon: NotNegative
    warmup_epochs: NotNegative | None
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None
    warmup_steps: Annotated[int | float, Field(ge=0)] | None
    max_grad_norm: NotNegative
    logging_steps: Steps
    save_steps: Steps
    eval_steps: Steps | None
    eval_delay: NotNegative | None
    save_total_limit: Annotated[int, Field(ge=0)] | None
    ddp_timeout: Count
    gradient_checkpointing: Annotated[Any, AfterValidator(_checkpointing)]
    activation_checkpointing: Annotated[Any, AfterValidator(_checkpointing)]
    seed: Seed
    data_seed: Seed | None
    hub_token: Annotated[Any, AfterValidator(_token)]


class TrainerSection(Section):
    handler: str = ""  # where nothing is trained
    args: TrainerArgs = Field(default_factory=TrainerArgs)
    method_args: dict[str, Any] = Field(default_factory=dict)
    plugins: dict[str, dict[str, Any] | None] = Field(default_factory=dict)
    needs_alternates: bool = False  # refusals will not do
    on_divergence: Literal["stop", "skip", "rollback"] = "stop"
    on_change: Literal["stop", "resume"] = "stop"  # of settings, where a run is resumed


class Paths(Section):
    output_dir: Annotated[str, AfterValidator(_own_folder)]
    root_dir: str = "."
    datasets_dir: Annotated[str | None, AfterValidator(_folder)] = None


TaskName = Annotated[str, BeforeValidator(_task_name), AfterValidator(_inside_saves)]


class Config(Section):
    """A whole config of train, unlearn, alternates or eval."""

    mode: Literal["finetune", "unlearn", "alternates", "eval"]
    task_name: TaskName
    model: ModelSection
    paths: Paths
    trainer: TrainerSection = Field(default_factory=TrainerSection)
    data: DataKeys = Field(default_factory=DataKeys)
    alternates: AlternatesKeys = Field(default_factory=AlternatesKeys)
    collator: dict[str, CollatorKeys] = Field(default_factory=dict)
    eval: dict[str, dict[str, Any]] = Field(default_factory=dict)
    evaluate: bool = True  # false leaves out all of eval
    seed: Seed = 0
    global_batch_size: Count | None = None  # rows of one optimiser step, of all processes
    # print what would be asked, or the first rows, and stop; what an evaluation prints
    plan: bool = False
    output: Literal["lines", "quiet", "json"] = "lines"
    # named once in an experiment, used in several places of it
    forget_split: str | None = None
    retain_split: str | None = None
    holdout_split: str | None = None
    retain_logs_path: str | None = None
    question_key: str | None = None
    answer_key: str | None = None
    data_split: str | None = None
    data_sub_set: str | None = None


def read(cfg: Mapping[str, Any]) -> Config:
    """The checked config; ``cfg`` itself is not changed.

    Raises:
        InputError: every mistake found, one a line.
    """
    content = plain(cfg)
    if isinstance(content.get("model"), Mapping):
        content["model"] = _with_lora_default(content["model"])
    if content.get("evaluate") is False:
        content["eval"] = {}
    if isinstance(content.get("data"), Mapping):
        refuse_unread(content["data"], content.get("mode"), referred(cfg))
        content["data"] = _without_files(content["data"], content)
    config = checked(Config, content)
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    wrong = [*_contradictions(config), *_no_share(config.global_batch_size, processes)]
    if wrong:
        raise InputError("\n".join(wrong))
    if config.global_batch_size is None:
        return config
    args = shared_out(config.trainer.args, config.global_batch_size, processes)
    trainer = config.trainer.model_copy(update={"args": args})
    return config.model_copy(update={"trainer": trainer})


def _no_share(rows: int | None, processes: int) -> Iterator[str]:
    if rows is not None and rows % processes:
        less = rows - rows % processes
        near = [str(number) for number in (less, less + processes) if number]
        yield (
            f"global_batch_size is {rows}, which {processes} processes cannot share evenly. Set "
            f"global_batch_size={' or '.join(near)}, or start another number of processes."
        )


def shared_out(args: TrainerArgs, rows: int, processes: int) -> TrainerArgs:
    """``trainer.args`` with which a step of all processes has this many rows.

    ``per_device_train_batch_size`` is what fits into memory: a micro-batch is as large as divides
    a process's rows, and no larger than that.
    """
    share, most = rows // processes, args.get("per_device_train_batch_size", 8)
    size = next(n for n in range(min(share, most), 0, -1) if share % n == 0)
    layout = {"per_device_train_batch_size": size, "gradient_accumulation_steps": share // size}
    return {**args, **layout}  # type: ignore[typeddict-item]


def model_section(cfg: Mapping[str, Any] | ModelSection) -> ModelSection:
    """The checked section ``model`` of a config.

    Raises:
        InputError: every mistake found, one a line.
    """
    if isinstance(cfg, ModelSection):
        return cfg
    return checked(ModelSection, _with_lora_default(plain(cfg)), "model")


def section_as_written(content: Mapping[str, Any]) -> ModelSection:
    """The checked section ``model`` of a file that a run left, in which ``${...}`` is only text.

    Raises:
        InputError: every mistake found, one a line.
    """
    return checked(ModelSection, _with_lora_default(content), "model")


def plain(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in plain Python with every interpolation resolved.

    Raises:
        InputError: a value is missing, or refers to something that is not there.
    """
    try:
        if not isinstance(cfg, DictConfig):
            cfg = OmegaConf.create(dict(cfg), flags={"allow_objects": True})
        missing = list(_missing(OmegaConf.to_container(cfg)))
        if missing:
            raise InputError("\n".join(f"{key} has no value. Give {key}=..." for key in missing))
        with without_environment():
            content: Any = OmegaConf.to_container(cfg, resolve=True)
        return content
    except OmegaConfBaseException as error:
        if isinstance(error, InterpolationKeyError) and "targets." in str(error):
            raise InputError(
                "No published model that knows these facts is listed for this model. Fine-tune "
                "one and give its run folder: model.model_args.pretrained_model_name_or_path=..."
            ) from error
        raise InputError(resolution_mistake(error) or " ".join(str(error).split())) from error


@contextmanager
def without_environment() -> Iterator[None]:
    """No value of a config is read from the environment: it would be written with the config."""
    from omegaconf.resolvers import oc

    def refuse(name: str, *_: Any) -> None:
        raise InputError(
            f"${{oc.env:{name}}} would read a variable of the environment into a config, which is "
            "written beside the results. Have the shell do it: KEY=$" + name
        )

    OmegaConf.register_new_resolver("oc.env", refuse, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, use_cache=False, replace=True)


def resolution_mistake(error: BaseException, words: Sequence[str] = ()) -> str | None:
    """What is wrong with a ``${...}``: what a resolver of ours said, or that it leads nowhere.

    Args:
        words: the overrides of the command line, which OmegaConf does not name.
    """
    key = getattr(error, "full_key", None)
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, InputError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return _unresolved(str(error).partition("\n")[0], key, words)
    return f"{key}: {cause}" if key else str(cause)


UNRESOLVED = {  # what OmegaConf says of a ${...} -> what is wrong with the key
    r"Interpolation key '(.+?)' not found": "refers to {}, and the config has no such key. Write "
    "the value, or a key that is there; a variable of the shell stands outside of single quotes.",
    "Recursive interpolation()": "refers to itself, maybe through other keys. Write the value.",
    r"Unsupported interpolation type (\S+)": "asks for {}, and there is no such resolver. Write "
    "the value.",
}


def _unresolved(said: str, key: str | None, words: Sequence[str]) -> str | None:
    for pattern, why in UNRESOLVED.items():
        if found := re.search(pattern, said):
            typed = [word.lstrip("+") for word in words if "${" in word and found[1] in word]
            typed.sort(key=lambda word: f"${{{word.partition('=')[0]}}}" not in word)
            return f"{without_setting(typed[0]) if typed else key} {why.format(found[1])}"
    return None


def _missing(content: Any, above: str = "") -> Iterator[str]:
    """The keys whose value is still ``???``."""
    pairs = content.items() if isinstance(content, Mapping) else ()
    for key, value in pairs:
        if value == "???":
            yield f"{above}{key}"
        yield from _missing(value, f"{above}{key}.")


@cache
def shipped(file: str) -> Mapping[str, Any]:
    """What one of our configs without references to others says, e.g. ``lora/default.yaml``."""
    text = resources.files("unlora.configs").joinpath(file).read_text("utf-8")
    content: Any = OmegaConf.to_container(OmegaConf.create(text))
    return content


def _with_lora_default(model: Mapping[str, Any]) -> dict[str, Any]:
    given = model.get("lora_config")
    if given is None or isinstance(given, Mapping):
        given = {**shipped("lora/default.yaml"), **(given or {})}
    return {**model, "lora_config": given}


def _without_files(data: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """The section ``data`` with a data set in place of each file of the user's that is trained on.

    The suite ``own`` refers to the files in its own section; an evaluation has no other data.

    Raises:
        InputError: they are no files, or what is evaluated has nothing to do with them.
    """
    evaluates = content.get("mode") == "eval"
    files = {key: data[key] for key in data if isinstance(data[key], str) and key != "anchor"}
    if isinstance(data.get("train"), list):
        files["train"] = data["train"]
    if evaluates:
        files |= {key: data[key] for key in OWN_DATA if key in data}
    suites = content.get("eval") or {}
    benchmarks = [] if "own" in suites else list(suites)
    wrong = []
    for key, value in data.items():
        kinds = (str, Mapping, list if key == "train" else type(None), type(None))
        if key in DataKeys.__annotations__ and key != "anchor" and not isinstance(value, kinds):
            wrong.append(
                f"data.{key} is {value!r}; it must be one file of questions and answers, or a "
                "section of data sets."
            )
    for key, file in files.items():
        if benchmarks and not evaluates:
            wrong.append(
                f"data.{key} is {file!r} (text), but {benchmarks[0]} is a benchmark. Files are for "
                f"{_own_experiment(content)}. In this experiment, choose a data set with "
                f"data/datasets@data.{key}=NAME and set "
                f"data.{key}.NAME.args.hf_args.path={file}"
            )
        elif evaluates and key not in OWN_DATA:
            wrong.append(unknown("key of data in an evaluation", key, OWN_DATA))
        elif evaluates and file is not None and "own" not in suites:
            wrong.append(f"data.{key} is set, but the suite own is not chosen. Give eval=own.")
        elif file is not None and (mistake := _file_mistake(file)):
            wrong.append(f"data.{key} is {file!r}{mistake}")
    if wrong:
        raise InputError("\n".join(wrong))
    if evaluates:
        return {key: value for key, value in data.items() if key not in files}
    # what only the evaluation after a training asks about is no data of the training
    named = {key: value for key, value in data.items() if key != "holdout"}
    return {key: _as_data_set(v, content) if key in files else v for key, v in named.items()}


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


def _contradictions(config: Config) -> list[str]:
    data, wrong = config.data, []
    for suite, settings in config.eval.items():
        log, run = str(settings.get("output_dir") or ""), config.paths.output_dir
        if (
            config.mode == "eval"
            and log
            and Path(os.path.realpath(run))
            not in (
                real := Path(os.path.realpath(log)),
                *real.parents,
            )
        ):
            wrong.append(
                f"eval.{suite}.output_dir is {log!r}, which is not in the run folder {run!r}. Set "
                "paths.output_dir instead."
            )
        if not settings.get("handler"):
            wrong.append(f"eval.{suite} is set, but that suite is not chosen. Give eval={suite}.")
    if config.mode == "eval":
        if not config.eval:
            wrong.append("mode is eval, but no suite is chosen. Give eval=tofu.")
        return wrong
    wrong += _unknown_arguments(config.trainer.args)
    folder, given = config.paths.output_dir, config.trainer.args.get("output_dir")
    if given is not None and Path(str(given)) != Path(folder):
        wrong.append(
            f"trainer.args.output_dir is {given!r}, but the run goes to paths.output_dir, which is "
            f"{folder!r}. Set paths.output_dir instead."
        )
    if not config.trainer.handler:
        return [*wrong, f"mode is {config.mode}, but there is no trainer. Give trainer=NAME."]
    finetunes = config.trainer.handler == "FinetuneTrainer"
    if finetunes != (config.mode == "finetune"):
        wrong.append(
            f"mode is {config.mode}, but trainer.handler is {config.trainer.handler}. Use "
            "--config-name=train with experiment=finetune/..., --config-name=unlearn with "
            "experiment=unlearn/... and trainer=NAME."
        )
    for part in ("train",) if finetunes else ("forget",):
        if not data.get(part):
            wrong.append(f"data.{part} is not set. Add it with data/datasets@data.{part}=NAME.")
    alpha = config.trainer.method_args.get("alpha")
    if alpha and not finetunes and not (data.get("retain") or data.get("train")):
        wrong.append(
            f"trainer.method_args.alpha is {alpha}, but data.retain is not set. Add it with "
            "data/datasets@data.retain=NAME, or set trainer.method_args.alpha=0."
        )
    return wrong


def _unknown_arguments(given: Mapping[str, Any]) -> list[str]:
    """Keys of ``trainer.args`` that no version of TrainingArguments or of ours had.

    The names are read from the file of transformers, whose import takes seconds; the trainer checks
    them again, and what they are set to.
    """
    known = _declared_arguments()
    wrong = [key for key in given if known and key not in known]
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


def checked(schema: type[Section], content: Mapping[str, Any], *above: str) -> Any:
    """A section as its type; ``above`` are the keys under which it stands.

    Raises:
        InputError: every mistake found, one a line.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        found = error.errors(include_url=False)
        raise InputError("\n".join(_sentence(schema, item, above) for item in found)) from error


EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "a section with keys",
    "model_type": "a section with keys",
    "list_type": "a list",
}


def _sentence(schema: type[Section], error: Mapping[str, Any], above: tuple[str, ...]) -> str:
    """One mistake in words: the key, the value given, what is allowed."""
    loc = tuple(str(step) for step in error["loc"])
    key, kind = ".".join([*above, *loc]), error["type"]
    value = _shown(error["input"], loc)
    if kind == "extra_forbidden":
        place = ".".join([*above, *loc[:-1]])
        return unknown(f"key of {place}" if place else "key", loc[-1], _keys(schema, loc))
    if kind == "missing":
        return f"{key} is missing. Give {key}=..."
    if kind == "value_error":
        reason = without_setting(str(error["ctx"]["error"]))
        return (
            f"{key}: {reason}" if reason.startswith("Unknown") else f"{key} is {value!r}: {reason}"
        )
    if kind == "literal_error":
        return unknown(key, value, re.findall("'(.*?)'", error["ctx"]["expected"]))
    given = f"{value!r} (text)" if isinstance(value, str) else repr(value)
    allowed = EXPECTED.get(kind) or error["msg"].removeprefix("Input should be ")
    return f"{key} is {given}; it must be {allowed}."


def _shown(value: Any, loc: tuple[str, ...]) -> Any:
    """A value without the secrets that are in it, or that it is."""
    if any(is_secret(step, value) for step in loc):
        return HIDDEN
    if isinstance(value, list):
        return [without_setting(one) if isinstance(one, str) else _shown(one, ()) for one in value]
    return without_secrets(value)


def _keys(schema: Any, loc: tuple[str, ...]) -> list[str]:
    """The keys that could stand where the last step of ``loc`` stands."""
    for step in loc[:-1]:
        schema = _inner(schema, step)
    return list(getattr(schema, "model_fields", getattr(schema, "__annotations__", ())))


def _inner(schema: Any, step: str) -> Any:
    """The type of the value under key ``step``."""
    fields = getattr(schema, "model_fields", None)
    inner = fields[step].annotation if fields else getattr(schema, "__annotations__", {}).get(step)
    if get_origin(schema) is dict:
        inner = get_args(schema)[1]
    while get_origin(inner) not in (None, dict):  # Required[X], X | None
        inner = get_args(inner)[0]
    return inner
