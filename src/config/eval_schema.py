"""Declare the section of a suite: its settings, and the keys of each kind of data set."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Required

from pydantic import AfterValidator, Field, with_config
from typing_extensions import TypedDict

from unlora.config import value_types as values
from unlora.config.schema import STRICT
from unlora.config.validation import checked
from unlora.errors import InputError
from unlora.registry import unknown


def _where(value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError("it must be columns with the values to keep, e.g. {subject: [Anna, Ben]}.")
    return value


def _question_format(value: str) -> str:
    if "{}" not in value:
        raise ValueError("it must have {} where the question is to stand.")
    return value


@with_config(STRICT)
class _DataSet(TypedDict, total=False):
    handler: str
    hf_args: Required[dict[str, Any]]
    where: Annotated[Any, AfterValidator(_where)]
    max_length: Annotated[int, Field(gt=1)]
    max_new_tokens: values.Count
    stop: list[str]


@with_config(STRICT)
class QADataset(_DataSet, total=False):
    """Questions with an answer, or a list of answers, each; see ``unlora.evals.datasets``."""

    question_key: Required[str]
    answer_key: Required[str]
    question_format: Annotated[str, AfterValidator(_question_format)]
    few_shot_dataset_hf_args: dict[str, Any]
    several: bool
    needed: dict[str, str]
    optional: dict[str, str]


@with_config(STRICT)
class CompletionDataset(_DataSet, total=False):
    """Plain text, the end of which is scored where it has a prefix."""

    text_key: Required[str]
    prefix_key: str


DATA_SETS: dict[str, Any] = {"QADataset": QADataset, "CompletionDataset": CompletionDataset}


@with_config(STRICT)
class SuiteKeys(TypedDict, total=False):
    """The settings of a suite; what its metrics want is in their signatures."""

    handler: str
    output_dir: str | None
    overwrite: bool | None
    cache: bool | None
    retain_logs_path: Any
    target_logs_path: Any
    batch_size: values.Count | None
    token_budget: values.Count | None
    max_new_tokens: values.Count
    gradient_modules: values.ModuleNames
    fluency_classifier: str | None
    fluency_label: str | None
    only: list[str] | None
    panel: list[str] | None
    panel_rows: values.Count
    rouge: Literal["unicode", "ascii"]
    data: dict[str, Any] | None
    metrics: dict[str, Any] | None
    # read by interpolations in ``data`` only
    path: Any
    forget_split: Any
    holdout_split: Any
    question_key: Any
    answer_key: Any
    data_split: Any
    subject: Any


def check_data_set(section: Any, *above: str) -> None:
    """Refuse a declaration of a data set that cannot be read; ``above`` are the keys it is under.

    Raises:
        InputError: everything that is wrong, one mistake a line.
    """
    if not isinstance(section, Mapping):
        raise InputError(f"{'.'.join(above)} is {section!r}; it must be a section with a handler.")
    handler = section.get("handler", "")
    if handler not in DATA_SETS:
        raise InputError(unknown(f"handler of {'.'.join(above)}", handler, DATA_SETS))
    set_keys = {key: value for key, value in section.items() if value not in (None, "", {})}
    checked(DATA_SETS[handler], set_keys, *above)
