"""Declare the sections of a config: their keys, and the type of each value.

Every key that a user can mistype is known here, so a typo ends in a sentence and not in a run with
another setting than the one asked for. Sections hold the keys that were given and no others:
defaults stand in ``configs/`` or in the signature of the function that takes the value.
"""

from typing import Annotated, Any, Literal, Required

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, with_config
from typing_extensions import TypedDict

from unlora.config import value_types as values

STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


@with_config(STRICT)
class ModelArgs(TypedDict, total=False):
    """Keyword arguments of ``from_pretrained``."""

    pretrained_model_name_or_path: Required[str]
    torch_dtype: values.Dtype
    dtype: values.Dtype
    attn_implementation: str | None
    device_map: values.DeviceMap
    max_memory: Any
    quantization_config: dict[str, Any] | None
    low_cpu_mem_usage: bool
    trust_remote_code: bool
    revision: str | None
    subfolder: str | None
    variant: str | None
    token: values.Token
    cache_dir: str | None
    local_files_only: bool
    use_safetensors: values.UseSafetensors
    use_cache: bool
    rope_scaling: dict[str, Any] | None


@with_config(STRICT)
class TokenizerArgs(TypedDict, total=False):
    pretrained_model_name_or_path: str | None
    trust_remote_code: bool
    revision: str | None
    subfolder: str | None
    token: values.Token
    cache_dir: str | None
    local_files_only: bool
    use_fast: bool
    legacy: bool
    padding_side: Literal["left", "right"]
    model_max_length: values.Count
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

    r: values.Count
    lora_alpha: values.Positive
    lora_dropout: values.Share
    target_modules: values.TargetModules
    exclude_modules: values.ModuleNames
    bias: values.Bias
    task_type: Literal["CAUSAL_LM"]
    modules_to_save: values.ModulesToSave
    init_lora_weights: values.InitLoraWeights
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    layers_to_transform: values.LayerNumbers
    layers_pattern: values.Names
    target_parameters: values.ParameterNames
    rank_pattern: dict[str, values.Count]
    alpha_pattern: dict[str, values.Positive]


@with_config(STRICT)
class HubArgs(TypedDict, total=False):
    """Arguments of ``unlora.data.rows.load_rows``."""

    path: Required[str]
    name: str | None
    split: str | None
    data_files: str | list[str] | None
    select: list[int] | None
    exclude: list[int] | None
    revision: str | None
    token: values.Token


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


@with_config(STRICT)
class AlternatesKeys(TypedDict, total=False):
    """How other answers to the forget questions are made; see ``recipes.alternate_answers``."""

    repeats: values.Count
    tries: values.Count
    temperature: values.Positive
    top_p: Annotated[float, Field(gt=0, le=1)]
    max_new_tokens: values.Count
    batch_size: values.Count
    seed: values.Seed
    prompt: values.Prompt
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


def _one_dtype(args: dict[str, Any]) -> dict[str, Any]:
    # torch_dtype has a default in every YAML, so a dtype was asked for
    dtype = args.pop("dtype", None)
    return args if dtype is None else {**args, "torch_dtype": dtype}


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


@with_config(ConfigDict(extra="allow", strict=True, allow_inf_nan=False))
class TrainerArgs(TypedDict, total=False):
    """Those with a range; ``unlora.trainer`` checks all names against the TrainingArguments."""

    per_device_train_batch_size: values.BatchSize
    per_device_eval_batch_size: values.Count
    gradient_accumulation_steps: values.Count
    num_train_epochs: values.Positive
    max_steps: values.MaxSteps
    learning_rate: values.NotNegative
    weight_decay: values.NotNegative
    adam_beta1: values.Share
    adam_beta2: values.Share
    adam_epsilon: values.NotNegative
    warmup_epochs: values.NotNegative | None
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None
    warmup_steps: Annotated[int | float, Field(ge=0)] | None
    max_grad_norm: values.NotNegative
    logging_steps: values.Steps
    save_steps: values.Steps
    eval_steps: values.Steps | None
    eval_delay: values.NotNegative | None
    save_total_limit: Annotated[int, Field(ge=0)] | None
    ddp_timeout: values.Count
    gradient_checkpointing: values.Checkpointing
    activation_checkpointing: values.Checkpointing
    seed: values.Seed
    data_seed: values.Seed | None
    hub_token: values.Token


class TrainerSection(Section):
    handler: str = ""  # where nothing is trained
    args: TrainerArgs = Field(default_factory=TrainerArgs)
    method_args: dict[str, Any] = Field(default_factory=dict)
    plugins: dict[str, dict[str, Any] | None] = Field(default_factory=dict)
    needs_alternates: bool = False  # refusals will not do
    batch_is_auto: bool = False  # per_device_train_batch_size was auto, and is a first guess
    score_forget_end: bool = True  # the end token of forget answers counts in the loss
    on_divergence: Literal["stop", "skip", "rollback"] = "stop"
    on_change: Literal["stop", "resume"] = "stop"  # of settings, where a run is resumed


class Paths(Section):
    output_dir: values.OwnFolder
    root_dir: str = "."
    datasets_dir: values.ExistingFolder = None


class Config(Section):
    """A whole config of train, unlearn, alternates or eval."""

    mode: Literal["finetune", "unlearn", "alternates", "eval"]
    task_name: values.TaskName
    model: ModelSection
    paths: Paths
    trainer: TrainerSection = Field(default_factory=TrainerSection)
    data: DataKeys = Field(default_factory=DataKeys)
    alternates: AlternatesKeys = Field(default_factory=AlternatesKeys)
    collator: dict[str, CollatorKeys] = Field(default_factory=dict)
    eval: dict[str, dict[str, Any]] = Field(default_factory=dict)
    evaluate: bool = True  # false leaves out all of eval
    seed: values.Seed = 0
    global_batch_size: values.Count | None = None  # rows of one optimiser step, of all processes
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
