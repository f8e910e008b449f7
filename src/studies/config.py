"""Check the config of a study."""

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, Field, with_config
from typing_extensions import TypedDict

from unlora.cli.overrides import quoted
from unlora.config.resolve import plain
from unlora.config.schema import STRICT, Paths, Section
from unlora.config.unused_keys import referred
from unlora.config.validation import checked
from unlora.config.value_types import Count, Positive, TaskName
from unlora.errors import InputError
from unlora.registry import unknown
from unlora.runs.redaction import without_setting

logger = logging.getLogger(__name__)
TAKEN = ("target", "gold")
# no control signs, and none that turn the direction of writing round
NAME = re.compile(r"(?!\.)[^/\\$\x00-\x1f\x7f\u200e\u200f\u202a-\u202e\u2066-\u2069]{1,80}")
EVERY = "every"  # in the space of a search: keys of all methods


def _overrides(value: Any) -> Any:
    if not (isinstance(value, list) and value and all(isinstance(word, str) for word in value)):
        raise ValueError("it must be a list of overrides: [experiment=..., key=value].")
    return value


def _model(value: Any) -> Any:
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list):
        raise ValueError(
            "it must be a list of overrides of train.yaml, or a model that is there already: a run "
            "folder, a model folder or a repository of the hub."
        )
    return _overrides(value)


def _gold(value: Any) -> Any:
    return None if value is None else _model(value)


def _methods(value: Any) -> Any:
    if not (isinstance(value, dict) and value):
        raise ValueError("it must name methods, each with a list of overrides: NPO: [trainer=NPO].")
    methods = {str(name): overrides for name, overrides in value.items()}
    for name, overrides in methods.items():
        if name in TAKEN or not NAME.fullmatch(name):
            raise ValueError(
                f"a method cannot be called {name!r}; its name is a column and a folder: give it "
                "another, of at most 80 letters without / and without a dot in front."
            )
        if overrides is not None:
            try:
                _overrides(overrides)
            except ValueError as error:
                raise ValueError(f"{name} is {overrides!r}: {error}") from error
    return methods


def _seeds(value: Any) -> Any:
    if not (isinstance(value, list) and value and all(type(seed) is int for seed in value)):
        raise ValueError("it must be a list of whole numbers: seeds=[0,1,2].")
    if not all(0 <= seed < 2**32 for seed in value):
        raise ValueError("a seed is at least 0 and below 2**32.")
    if len(set(value)) < len(value):
        raise ValueError("a seed stands in it twice.")
    return value


def _dial(value: Any) -> Any:
    if value is None or value in ("audit", "plain"):
        return value
    match = re.fullmatch(r"utility=(\d*\.?\d+)", str(value))
    if not match or not 0 < float(match[1]) <= 1:
        raise ValueError("it must be audit, plain, utility=SHARE (up to 1), or null.")
    return value


def _range(value: Any) -> Any:
    """Choices, or the bounds of a number."""
    if isinstance(value, list) and value:
        return value
    numbers = isinstance(value, Mapping) and {"low", "high"} <= set(value) <= {"low", "high", "log"}
    if not numbers or not 0 <= float(value["low"]) < float(value["high"]):
        raise ValueError("it must be a list of choices, or {low: 1e-4, high: 1e-2, log: true}.")
    if value.get("log") and not value["low"]:
        raise ValueError("low must be above 0 on a logarithmic scale.")
    return value


@with_config(STRICT)
class Objective(TypedDict):
    """What a trial is judged by, see :func:`unlora.studies.tuning.judge`.

    ``forget``: metrics whose distance to gold counts; ``utility``: the metric that must keep
    ``keep`` of the target's value.
    """

    forget: list[str]
    utility: str
    keep: Annotated[float, Field(gt=0, le=1)]


@with_config(STRICT)
class SearchKeys(TypedDict):
    """A search for each method's settings.

    ``space``: ``every`` or a method -> key of the config -> choices, or bounds of a number.
    """

    trials: Annotated[int, Field(ge=0)]
    seed: int
    objective: Objective
    space: dict[str, dict[str, Annotated[Any, AfterValidator(_range)]]]


@with_config(STRICT)
class OwnModel(TypedDict):
    """A model that the lists of a study name."""

    path: str
    torch_dtype: NotRequired[str]


@with_config(STRICT)
class OwnFiles(TypedDict, total=False):
    """Files of questions and answers that the lists of a study name."""

    forget: str
    retain: str
    holdout: str | None


@with_config(STRICT)
class OwnFinetune(TypedDict, total=False):
    """How long target and gold are trained, which the lists of a study name."""

    num_train_epochs: Positive
    learning_rate: Positive


@with_config(STRICT)
class OwnRows(TypedDict, total=False):
    """How many rows of each data set there are, which the lists of a study name."""

    retain: Count
    holdout: Count
    utility: Count


class Study(Section):
    """A whole config of ``study``."""

    mode: Literal["study"]
    task_name: TaskName
    paths: Paths
    workers: Count
    seeds: Annotated[Any, AfterValidator(_seeds)]
    target: Annotated[Any, AfterValidator(_model)]
    gold: Annotated[Any, AfterValidator(_gold)]
    unlearn: Annotated[Any, AfterValidator(_overrides)]
    methods: Annotated[Any, AfterValidator(_methods)]
    search: SearchKeys
    audit: dict[str, dict[str, Any] | None] | None = None
    audit_seeds: Count | None = None
    dial: Annotated[Any, AfterValidator(_dial)] = None
    # named once, used in several of the lists
    model: OwnModel | None = None
    data: OwnFiles | None = None
    finetune: OwnFinetune | None = None
    rows: OwnRows | None = None
    question_key: str | None = None
    answer_key: str | None = None
    dry_run: bool = False
    stage: str | None = None  # of a job: the file that says what it does


def _named_once(study: Study) -> Iterator[tuple[str, Any]]:
    for part in ("model", "data", "finetune", "rows"):
        yield from ((f"{part}.{key}", v) for key, v in (getattr(study, part) or {}).items())
    yield from ((key, getattr(study, key)) for key in ("question_key", "answer_key"))


def _with_datasets_dir(study: Study) -> Study:
    """The study whose runs look for data sets where it does, unless a list says otherwise."""
    if study.paths.datasets_dir is None:
        return study
    word = f"paths.datasets_dir={quoted(str(study.paths.datasets_dir))}"
    lists = {name: getattr(study, name) for name in ("target", "gold", "unlearn")}
    return study.model_copy(
        update={name: [word, *words] for name, words in lists.items() if isinstance(words, list)}
    )


def read(cfg: Mapping[str, Any]) -> Study:
    """The checked config.

    Raises:
        InputError: every mistake found, one a line.
    """
    study: Study = _with_datasets_dir(checked(Study, plain(cfg)))
    search = study.search
    wrong = [
        f"{without_setting(word)} would be written into the files of the study. Log in with "
        "`hf auth login`, or set HF_TOKEN, and leave it out."
        for words in (study.target, study.gold, study.unlearn, *study.methods.values())
        for word in (words if isinstance(words, list) else ())
        if without_setting(word) != word
    ]
    if study.dial == "audit" and study.audit is None:
        wrong.append("dial is audit, but there is none. Give audit=default, or dial=plain.")
    if study.dial is not None:
        wrong += [
            f"A method cannot be called {name!r} where dial is set: that of {name[:-8]!r} is "
            "called so."
            for name in study.methods
            if name.endswith("-dialled")
        ]
    used = referred(cfg)
    wrong += [
        f"{key} is set, but no list of this study uses it. Leave it out, or give a study that does:"
        " experiment=study/own/lora."
        for key, value in _named_once(study)
        if value is not None and used and key not in used
    ]
    if search["trials"]:
        known = (EVERY, *study.methods)
        for name in (name for name in search["space"] if name not in known):
            logger.warning("%s", unknown("method in search.space", name, known))
        if study.gold is None:
            wrong.append("search.trials needs gold, as trials are judged by their distance to it.")
        if search["seed"] in study.seeds:
            wrong.append(
                f"search.seed is {search['seed']}, which is one of seeds: settings must not be "
                "chosen on a seed that is reported. Give search.seed another number."
            )
        wrong += [
            f"search.trials is {search['trials']}, but {name} has nothing to search. Give "
            f"search.space.{name}, or search.space.{EVERY}."
            for name in study.methods
            if not {**search["space"].get(EVERY, {}), **search["space"].get(name, {})}
        ]
    if wrong:
        raise InputError("\n".join(wrong))
    return study
