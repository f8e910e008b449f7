"""Read what one run left in its folder: evaluation logs, manifest, config, lineage."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlora.errors import InputError
from unlora.results.eval_log import KINDS, REMEDY, EvalLog, LogEntry, read_log
from unlora.runs.safe_loading import read_mapping

RECORDS = ("manifest", "run_config", "eval_manifest", "eval_config", "lineage")


@dataclass(frozen=True)
class RunResult:
    """What one run left in its folder.

    Attributes:
        folder: a run folder of ours, one with a log and nothing else, or one of Open-Unlearning's
            ``saves/``.
        logs: benchmark (``TOFU``, ``MUSE``, ``RWKU``, ``OWN``, ``LMEval``) -> its log.
        records: file name without ``.json`` -> content, of the records that are there.
    """

    folder: Path
    logs: Mapping[str, EvalLog]
    records: Mapping[str, Mapping[str, Any]]

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved config of the training, or of the evaluation of a model from elsewhere."""
        return self.records.get("run_config") or self.records.get("eval_config") or {}

    @property
    def manifest(self) -> Mapping[str, Any]:
        """What ran: command, versions, machine, time, and what the guards measured."""
        return self.records.get("manifest") or self.records.get("eval_manifest") or {}

    @property
    def lineage(self) -> tuple[tuple[str, str], ...]:
        """Root model, then every adapter on it: (path, hash); empty where none was recorded."""
        lineage = self.records.get("lineage", {})
        root = lineage.get("root")
        if not isinstance(root, Mapping):
            return ()
        links = [link for link in lineage.get("links") or () if isinstance(link, Mapping)]
        return (
            (str(root.get("given") or root.get("path") or "?"), str(root.get("fingerprint") or "")),
            *((str(link.get("path")), str(link.get("sha256") or "")) for link in links),
        )

    def entry(self, kind: str, metric: str) -> LogEntry:
        """One metric of one log; an entry without a value where there is none."""
        return self.logs[kind].get(metric, NOTHING) if kind in self.logs else NOTHING


NOTHING = LogEntry({})


def read_run(folder: str | Path) -> RunResult:
    """Read what a run left: its manifest, its figures with their intervals, its lineage.

    Raises:
        InputError: the folder is not there, holds neither a log nor a record of a run, or a file
            in it is broken.
    """
    folder = Path(folder).expanduser()
    files = find_logs(folder)
    logs = {kind: read_log(file) for kind, file in files.items()}
    run = RunResult(folder, logs, read_records(folder, *files.values()))
    if not logs and not run.records:
        raise InputError(
            f"The folder {str(folder)!r} holds no run: neither manifest.json nor an evaluation log "
            "(TOFU_EVAL.json, ...). Give a run folder, e.g. saves/unlearn/mine."
        )
    return run


def find_logs(folder: Path) -> dict[str, Path]:
    """kind -> its log in a run folder; that of the last checkpoint where there are several.

    Raises:
        InputError: the folder is not there, or has logs of several splits.
    """
    if not folder.is_dir():
        raise InputError(
            f"There is no folder {str(folder)!r}. Give run folders, e.g. saves/unlearn/mine."
        )
    checkpoints = sorted(folder.glob("checkpoint-*"), key=_number_of, reverse=True)
    homes = [folder / "evals", folder, *(checkpoint / "evals" for checkpoint in checkpoints)]
    logs: dict[str, Path] = {}
    for kind in KINDS:
        name = f"{kind}_EVAL.json"
        of_splits = sorted(folder.glob(f"evals_*/{name}"))
        file = next((home / name for home in homes if (home / name).is_file()), None)
        if file is None and len(of_splits) > 1:
            raise InputError(
                f"{str(folder)!r} has logs of several splits. Give one of them: "
                + ", ".join(str(log.parent) for log in of_splits)
            )
        file = file or next(iter(of_splits), None)
        if file is not None:
            logs[kind] = file
    return logs


def read_records(folder: Path, *logs: Path) -> dict[str, Mapping[str, Any]]:
    """What a run folder says of itself: the records of :data:`RECORDS` that are there.

    Args:
        logs: those of an evaluation may be beside its log.
    """
    records: dict[str, Mapping[str, Any]] = {}
    for name in RECORDS:
        for home in (folder, *(log.parent for log in logs)):
            if name not in records and (home / f"{name}.json").is_file():
                records[name] = read_mapping(home / f"{name}.json", remedy=REMEDY)
    if "run_config" not in records:
        for home in (folder, *folder.parents[:1]):
            if (home / ".hydra" / "config.yaml").is_file():
                records["run_config"] = _read_yaml(home / ".hydra" / "config.yaml")
                break
    if "training" not in records.get("manifest", {}):
        states = sorted(
            [*folder.glob("trainer_state.json"), *folder.glob("checkpoint-*/trainer_state.json")],
            key=lambda file: _number_of(file.parent),
        )
        if states:
            history = read_mapping(states[-1], remedy=REMEDY).get("log_history") or []
            records["manifest"] = {**records.get("manifest", {}), "training": history}
    return records


def _read_yaml(file: Path) -> Mapping[str, Any]:
    import yaml

    try:
        text = file.read_text("utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError("it refers to parts of itself, which may stand for any number of them")
        content = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(
            f"{str(file)!r} is not YAML: {error}. Put it right, or leave it out."
        ) from error
    return content if isinstance(content, dict) else {}


def _number_of(checkpoint: Path) -> int:
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else -1
