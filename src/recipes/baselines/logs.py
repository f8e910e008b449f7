"""Find a suite's log in a run folder, and check that it may be compared with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unlora.config.schema import Config
from unlora.errors import InputError
from unlora.evals.suite_checks import KINDS
from unlora.model import resolve_model
from unlora.recipes.baselines.evaluation import RETAIN, TARGET, build
from unlora.recipes.baselines.retain_model import RUN_CONFIG
from unlora.results.baseline_log import KEYS, find_log
from unlora.runs.safe_loading import read_json


def fitting_log(config: Config, suite: str, key: str, folder: Path) -> Path | None:
    """The log of a suite in a run folder, if it is of the same data and has all that is needed."""
    ours = config.eval[suite]
    log = log_in(folder, KINDS[ours["handler"]])
    if log is None:
        return None
    theirs = _settings_of(log, folder, ours["handler"])
    if theirs is not None:
        shared = ours["data"].keys() & theirs["data"].keys()
        if any(ours["data"][name] != theirs["data"][name] for name in shared):
            return None
        if ours.get("max_new_tokens") != theirs.get("max_new_tokens"):
            return None
    try:
        others = {RETAIN: None, TARGET: None}
        with_log = {suite: {**ours, **others, key: str(log)}}
        (made,) = build(config, resolve_model(config.model), with_log)
    except InputError:
        return None
    sources = [source for request in made.requests for source in request.sources()]
    lacks = any(
        KEYS.get(kind) == key and name not in made.logs[kind].entries for kind, name in sources
    )
    return None if lacks else log


def _settings_of(log: Path, folder: Path, handler: str) -> Mapping[str, Any] | None:
    """The settings of the suite that a log was made with, where the run has kept them."""
    for file in (log.parent / "eval_config.json", folder / RUN_CONFIG):
        try:
            suites = read_json(file)["eval"].values()
            return next(suite for suite in suites if suite["handler"] == handler and suite["data"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
            continue
    return None


def log_in(folder: Path, kind: str) -> Path | None:
    """The log of a suite in a folder, or in its folder evals."""
    try:
        return find_log(folder, kind)
    except InputError:
        return None
