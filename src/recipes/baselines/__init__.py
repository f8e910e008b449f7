"""Find the models that an evaluation compares with: the retain model and the target.

``retain_logs_path`` of a suite names a model that never saw the forget data, ``target_logs_path``
the model before it was made to forget. Either is a log, a run folder, a model that must be
evaluated first, or ``auto``:

    found = find(config)                 nothing heavy: every mistake shows here
    suites = build_suites(evaluated(config, found), ...)

What is not given, or not found, is not computed, and the log says how to come by it.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlora.config.schema import Config
from unlora.errors import InputError
from unlora.evals import check
from unlora.evals.passes.batching import gathered, rank_and_size
from unlora.evals.suite_checks import KINDS, check_suite
from unlora.model.lineage import FILE, Lineage, looks_local
from unlora.recipes.baselines.advice import how_to_make_gold
from unlora.recipes.baselines.doubts import doubts
from unlora.recipes.baselines.evaluation import RETAIN, TARGET, evaluate, own_path, why_unusable
from unlora.recipes.baselines.logs import fitting_log, log_in
from unlora.recipes.baselines.retain_model import find_gold
from unlora.recipes.run_history import RUN_CONFIG, History, same, start_of
from unlora.results.baseline_log import KEYS, WHOSE, BaselineLog
from unlora.runs.safe_loading import near

FOLDERS = {RETAIN: "reference", TARGET: "target"}
logger = logging.getLogger("unlora.recipes.baselines")


@dataclass(frozen=True)
class Pending:
    """A reference that must be evaluated: a model, the suite, and the folder for its log."""

    suite: str
    key: str
    model: str
    folder: Path


@dataclass(frozen=True)
class Found:
    """What is known of the references of a config before a model is loaded.

    Attributes:
        eval: the section ``eval``: in place of each reference its log, or ``{"advice": ...}``.
        pending: the references that must be evaluated.
    """

    eval: dict[str, dict[str, Any]]
    pending: tuple[Pending, ...] = ()


def find(config: Config) -> Found:
    """Look for the references of every suite; nothing is evaluated and no weights are loaded.

    Raises:
        InputError: something is wrong in a suite; or what is given for a reference is neither a
            log, nor a model, nor ``auto``.
    """
    check({suite: without_references(settings) for suite, settings in config.eval.items()})
    section: dict[str, dict[str, Any]] = {}
    pending: list[Pending] = []
    for suite, settings in config.eval.items():
        section[suite] = dict(settings)
        if settings.get("handler") not in KINDS:
            continue
        for key in (RETAIN, TARGET):
            answer = _find(config, suite, key)
            if isinstance(answer, Pending) and not _is_read(suite, settings, key):
                answer = None
            elif isinstance(answer, Pending):
                pending.append(answer)
                answer = {"advice": f"{answer.model} is evaluated for it first"}
            section[suite][key] = answer
    baselines = Found(section, tuple(pending))
    rank, processes = rank_and_size()
    return (
        baselines if processes == 1 else gathered({rank: baselines})[0]
    )  # all go on with the same


def evaluated(config: Config, baselines: Found) -> dict[str, dict[str, Any]]:
    """The section ``eval`` with a log for every reference; each model is gone again afterwards.

    Raises:
        InputError: a model cannot be loaded, or something in the data is wrong.
    """
    section = {suite: dict(settings) for suite, settings in baselines.eval.items()}
    models = dict.fromkeys(evaluation.model for evaluation in baselines.pending)
    own = own_path(config)  # what will be trained comes first: it may be of no use
    for model in sorted(models, key=lambda model: model != own):
        wanted = [evaluation for evaluation in baselines.pending if evaluation.model == model]
        folders = {evaluation.suite: evaluation.folder for evaluation in reversed(wanted)}
        for suite, folder in folders.items():
            logger.info("eval.%s: evaluating the reference %s, in %s", suite, model, folder)
        evaluate(config, model, folders)
        for evaluation in wanted:
            kind = KINDS[config.eval[evaluation.suite]["handler"]]
            section[evaluation.suite][evaluation.key] = str(
                folders[evaluation.suite] / f"{kind}_EVAL.json"
            )
    return section


def _is_read(suite: str, settings: Mapping[str, Any], key: str) -> bool:
    """Whether what is asked for is compared with a reference; of single figures few are."""
    if not settings.get("only"):
        return True
    requests = check_suite(suite, without_references(settings))
    return any(KEYS.get(kind) == key for request in requests for kind, _ in request.sources())


def _find(config: Config, suite: str, key: str) -> Any:
    """One reference: the path of a log, ``Pending``, or ``{"advice": ...}``."""
    value = config.eval[suite].get(key)
    if value is not None and not isinstance(value, str):
        raise InputError(f"eval.{suite}.{key} is {value!r}; it must be {_allowed(config, suite)}.")
    if not value:
        advice = _advice(config, suite, key)
        return {"advice": advice} if advice else None
    if value == "auto":
        return _auto_retain(config, suite) if key == RETAIN else _auto_target(config, suite)
    answer = _given(config, suite, key, value)
    if reasons := doubts(config, suite, key, value):
        logger.warning(
            "eval.%s.%s: %s: figures beside it may not mean what they say: %s",
            suite, key, value, "; ".join(reasons),
        )  # fmt: skip
    return answer


def _given(config: Config, suite: str, key: str, path: str) -> str | Pending:
    """What a path stands for.

    Raises:
        InputError: nothing, or the very model that is to be compared.
    """
    name = f"eval.{suite}.{key}"
    kind, allowed = KINDS[config.eval[suite]["handler"]], _allowed(config, suite)
    own = f"{name} is {path!r}, {{}}: a model is not its own reference. Give another."
    if Path(path).is_file():
        return str(BaselineLog(path, kind, name).file)
    output = Path(config.paths.output_dir)
    if any(same(path, folder) for folder in (output, output / "evals")):
        raise InputError(own.format("the folder that this run is written to"))
    if Path(path).is_dir():
        if (log := log_in(Path(path), kind)) is not None:
            return str(BaselineLog(log, kind, name).file)
        try:
            Lineage.read(path)
        except InputError as error:
            raise InputError(
                f"{name} is {path!r}, which holds no {kind}_EVAL.json, neither directly nor in "
                f"evals/, and is no model: {error} It must be {allowed}."
            ) from error
    elif looks_local(path) or path.endswith(".json"):
        raise InputError(f"{name} {path!r} is not there. It must be {allowed}.")
    if config.mode == "eval" and same(path, own_path(config)):
        raise InputError(own.format("the model that is evaluated"))
    if why := why_unusable(config, path):
        raise InputError(f"{name} {path!r} cannot be used: {why}. It must be {allowed}.")
    return _pending(config, suite, key, path)


def _auto_retain(config: Config, suite: str) -> Any:
    """Find the retain model of the same origin: its log, ``Pending``, or advice without one."""
    settings = config.eval[suite]

    def log_of(folder: Path) -> Path | None:
        return fitting_log(config, suite, RETAIN, folder)

    try:
        gold = find_gold(
            config,
            settings,
            History.of(own_path(config), config.model.base),
            lambda run: log_of(run) is not None,
        )
    except InputError as error:
        raise InputError(f"eval.{suite}.{RETAIN} is 'auto': {error}") from error
    if gold is None:
        saves = Path(config.paths.root_dir) / "saves" / "finetune"
        advice = _advice(config, suite, RETAIN) or f"Give {WHOSE[RETAIN]}"
        return {
            "advice": f"auto found no run in {saves} that started from the same model, was trained "
            f"on the same data set, and never saw the forget data. {advice}"
        }
    log = log_of(gold)
    logger.info("eval.%s.%s is auto: %s", suite, RETAIN, log or gold)
    return str(log) if log else _pending(config, suite, RETAIN, str(gold))


def _auto_target(config: Config, suite: str) -> Any:
    """The model before it was made to forget: its log, ``Pending``, or advice."""
    try:
        target = _start(config)
    except InputError as error:
        return {"advice": f"auto cannot tell the model before it was made to forget: {error}"}
    if target is None:
        return {
            "advice": f"auto knows no model that {own_path(config)} was made to forget from. Set "
            f"eval.{suite}.{TARGET} to the run folder of that model"
        }
    if log := fitting_log(config, suite, TARGET, Path(target)):
        logger.info("eval.%s.%s is auto: %s", suite, TARGET, log)
        return str(log)
    if why := why_unusable(config, target):
        return {"advice": f"auto found {target}, which cannot be used: {why}"}
    return _pending(config, suite, TARGET, target)


def made_to_forget(config: Config) -> bool:
    """Whether the model of a config was made to forget, as far as its folder tells."""
    try:
        return _start(config) is not None
    except InputError:  # which is said when it is loaded
        return True


def _start(config: Config) -> str | None:
    """The model that forgetting started from, None where nothing was made to forget."""
    path = own_path(config)
    if config.mode != "eval":
        return path if config.mode == "unlearn" else None
    if runs := History.of(path, config.model.base).runs:
        if runs[0][1].get("mode") != "unlearn":
            return None
        return start_of(*runs[0])
    links = Lineage.read(path, config.model.base).links
    return str(links[-2].path) if len(links) > 1 else None


def _advice(config: Config, suite: str, key: str) -> str | None:
    """How to come by a reference that is missing, where that is known."""
    try:
        if key == RETAIN:
            return how_to_make_gold(config, suite, History.of(own_path(config), config.model.base))
        target = _start(config)
    except InputError:  # the model itself is out of reach, which is said when it is loaded
        return None
    return f"Set eval.{suite}.{TARGET}=auto, which takes {target}" if target else None


def _pending(config: Config, suite: str, key: str, model: str) -> Pending:
    """A model to evaluate, and where its log goes.

    A run keeps its own log if it has none yet, and all metrics are asked. Every other log goes to
    what is evaluated here: into its folder, and beside the folder of a training, which may yet be
    moved aside.
    """
    folder, output = Path(model), config.paths.output_dir
    is_run = any((folder / file).is_file() for file in (RUN_CONFIG, FILE))
    kind, is_whole = KINDS[config.eval[suite]["handler"]], not config.eval[suite].get("only")
    # a run may name any folder as its start, and any folder may be a link
    near_by = is_whole and near(folder / "evals", Path(output))
    if is_run and near_by and log_in(folder, kind) is None and os.access(folder, os.W_OK):
        return Pending(suite, key, model, folder / "evals")
    separator = "/" if config.mode == "eval" else "."
    return Pending(suite, key, model, Path(f"{output}{separator}{FOLDERS[key]}"))


def _allowed(config: Config, suite: str) -> str:
    kind = KINDS[config.eval[suite]["handler"]]
    return (
        f"a {kind}_EVAL.json, a run folder, a model (a folder or a hub repository), auto, or null"
    )


def without_references(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A suite without the logs that its figures are compared with."""
    return {key: value for key, value in settings.items() if key not in FOLDERS}
