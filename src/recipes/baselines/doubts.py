"""List what speaks against a log or a run that was given as retain model or target."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unlora.config.schema import Config
from unlora.data.rows import ReadRows
from unlora.errors import InputError
from unlora.recipes.baselines.evaluation import RETAIN, own_path
from unlora.recipes.baselines.retain_model import Unseen
from unlora.recipes.run_history import RUN_CONFIG, History, same, same_origin
from unlora.recipes.trained_rows import trained_rows
from unlora.runs.safe_loading import read_json

EVAL_CONFIG = "eval_config.json"


def doubts(config: Config, suite: str, key: str, path: str) -> list[str]:
    """Why figures that are compared with what was given may mean something else, a clause each.

    Nothing is said of what nobody knows: a log from elsewhere comes without the config of its run.

    Args:
        path: a log, a run folder or a model.
    """
    log = Path(path)
    folder = log.parent if log.is_file() else log
    try:
        model, template = _asked(folder, path)
        theirs, ours = History.of(model), History.of(own_path(config))
        reasons = list(_of_history(config, suite, key, theirs, ours))
    except (InputError, OSError, KeyError, TypeError):
        return []
    if template is not None and template != config.model.template_args:
        reasons.append("it was asked in another template")
    return reasons


def _asked(folder: Path, model: str) -> tuple[str, Mapping[str, Any] | None]:
    """The model behind what was given, and the template it was asked in, where that is kept."""
    for home in (folder, folder / "evals"):
        if (home / EVAL_CONFIG).is_file():
            section = read_json(home / EVAL_CONFIG)["model"]
            path = str(section["model_args"]["pretrained_model_name_or_path"])
            return path, section.get("template_args")
    for home in (folder, folder.parent):
        if (home / RUN_CONFIG).is_file():
            return str(home), read_json(home / RUN_CONFIG)["model"].get("template_args")
    return model, None


def _of_history(
    config: Config, suite: str, key: str, theirs: History, ours: History
) -> Iterator[str]:
    if not same_origin(theirs.origin, ours.origin):
        yield f"it stands on another root model, {theirs.origin} (this one on {ours.origin})"
    if key != RETAIN:
        return
    load = ReadRows(config.paths.datasets_dir)
    unseen = Unseen.of(config.eval[suite]["data"], load)
    for folder, run in theirs.runs:
        secret, parts = trained_rows(folder, run, load)
        if "train" in parts and unseen.among(parts["train"], secret):
            yield f"{folder} was trained on rows that are to be forgotten"
    if theirs.runs and theirs.runs[0][1].get("mode") == "unlearn":
        yield "it was made to forget itself, and so has seen them"
    elif ours.runs and theirs.runs and same(ours.runs[0][0], theirs.runs[0][0]):
        yield "it is the model that is evaluated"
