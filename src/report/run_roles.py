"""Find which runs are compared, and which are target and retain model, by what they say."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlora.errors import InputError
from unlora.report.runs import Entry, Role
from unlora.results.eval_log import REMEDY
from unlora.results.run_result import find_logs, read_records
from unlora.runs.safe_loading import near, read_mapping

STUDY = "study.json"
# a folder that only holds logs is called by the one above it
_INNER = re.compile(r"evals(_.*)?|checkpoint-\d+")
_GOLD = re.compile(r"gold|(.*[-_])?(retain\d*|retrain)", re.IGNORECASE)
_TARGET = re.compile(r"target|full|.*[-_](full|target)", re.IGNORECASE)


@dataclass(frozen=True)
class Study:
    """What ``study.json`` says: its runs with their roles, and the trials of its search."""

    name: str
    entries: tuple[Entry, ...]
    trials: tuple[Mapping[str, Any], ...] = ()
    budget: str | None = None
    missing: tuple[str, ...] = ()


def read_study(folder: Path) -> Study:
    """The runs of a study.

    Raises:
        InputError: its ``study.json`` is broken.
    """
    file = folder / STUDY
    content = read_mapping(file, remedy=REMEDY)
    try:
        entries = tuple(
            Entry(
                str(run["run"]),
                {"target": "target", "gold": "gold"}.get(run["role"], "method"),  # type: ignore[arg-type]
                _inside(folder, file, run["folder"]),
                run.get("seed"),
            )
            for run in content["runs"]
        )
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{str(file)!r} is no list of runs: each needs run, role, seed and folder, and "
            f"{error} is wrong or missing. Run the study again, or give its run folders."
        ) from error
    trials = content.get("trials") or ()
    return Study(
        str(content.get("name", folder.name)), entries, tuple(trials), content.get("budget"),
        tuple(map(str, content.get("missing") or ())),
    )  # fmt: skip


def _inside(study: Path, file: Path, run: str) -> Path:
    if not near(study / run, study):
        raise InputError(
            f"{str(file)!r} names {run!r} as a run, which is outside of the folders that the study "
            "is in. Give that run yourself, if it is to be reported: unlora report STUDY RUN"
        )
    return study / run


def entries_of(
    folders: Sequence[Path], *, target: Path | None = None, gold: Path | None = None
) -> list[Entry]:
    """The runs in these folders with names of their own and roles.

    A role that is not given is what an unlearned run says: it started from the target, and was
    compared with gold's log. Those two come along without being given, where they have logs.
    Failing that a folder's name tells (``full``, ``retain90``).

    Raises:
        InputError: a folder is not there, or holds no log.
    """
    listed = list(dict.fromkeys(_real(path) for path in (*folders, target, gold) if path))
    shown = {_real(path): path for path in (*folders, target, gold) if path}
    declared = {role: _said(listed, role) for role in ("target", "gold")}
    roles: dict[Path, Role] = {}
    for role, chosen in (("target", target), ("gold", gold)):
        named = _real(chosen) if chosen else declared[role]
        for folder in [named] if named else _by_name(listed, roles, role):
            if folder in roles:
                continue
            roles[folder] = role  # type: ignore[assignment]
            if folder not in shown:
                shown[folder] = Path(os.path.relpath(folder))
                listed.append(folder)
    names = _names([shown[folder] for folder in listed])
    return [
        Entry(name, roles.get(folder, "method"), shown[folder])
        for folder, name in zip(listed, names, strict=True)
    ]


def _said(folders: Sequence[Path], role: str) -> Path | None:
    """The folder of the run that the given ones say has this role."""
    for folder in folders:
        if not folder.is_dir():
            continue
        for path in _named(read_records(folder), role):
            for candidate in folders:
                if candidate != folder and _is(path, candidate):
                    return candidate
            for base in (Path(), *_above_saves(folder)):
                run = _run_of(base / path)
                if run is not None and run != folder and near(run, folder):
                    return run
    return None


def _named(records: Mapping[str, Mapping[str, Any]], role: str) -> Iterator[str]:
    """The paths by which a run names the model it started from, or the log of gold."""
    for config in (records.get("run_config", {}), records.get("eval_config", {})):
        if role == "target":
            model = config.get("model")
            args = model.get("model_args") if isinstance(model, Mapping) else None
            path = args.get("pretrained_model_name_or_path") if isinstance(args, Mapping) else None
            paths = [path] if config.get("mode") == "unlearn" else []
            keys = "target_logs_path"
        else:
            paths, keys = [], "retain_logs_path"
        suites = config.get("eval")
        sections = suites.values() if isinstance(suites, Mapping) else ()
        paths += [config.get(keys), *(s.get(keys) for s in sections if isinstance(s, Mapping))]
        yield from (path for path in paths if isinstance(path, str) and path not in ("", "auto"))


def _is(path: str, folder: Path) -> bool:
    """Whether a path of a config, or a repository on the hub, is the run in a folder."""
    real = _real(Path(path))
    if folder in (real, *real.parents):
        return True
    last = [part for part in Path(path).parts if not re.fullmatch(r"\w+\.json", part)]
    return len(last) == 2 and last[-1] in folder.parts and not Path(path).exists()


def _run_of(path: Path) -> Path | None:
    """The run folder that a path of a config is, or is in, if it has a log."""
    for folder in (path, path.parent, path.parent.parent) if path.exists() else ():
        try:
            if folder.is_dir() and not _INNER.fullmatch(folder.name) and find_logs(folder):
                return _real(folder)
        except InputError:
            continue
    return None


def _above_saves(folder: Path) -> list[Path]:
    return [parent.parent for parent in folder.parents if parent.name == "saves"]


def _by_name(folders: Sequence[Path], roles: Mapping[Path, Role], role: str) -> list[Path]:
    """At most one for each kind of log."""
    pattern = _TARGET if role == "target" else _GOLD
    fitting = [p for p in folders if p not in roles and pattern.fullmatch(_outer(p).name)]
    kinds = {folder: set(find_logs(folder)) for folder in fitting}
    alone = [p for p in fitting if not any(kinds[p] & kinds[q] for q in fitting if q != p)]
    return alone if len(folders) > 1 else []


def _names(folders: Sequence[Path]) -> list[str]:
    """The name of each folder, with as many folders above it as make it distinct."""
    parts = [_outer(_real(folder)).parts for folder in folders]
    names = []
    for i, mine in enumerate(parts):
        depth = 1
        while depth < len(mine) and any(
            other[-depth:] == mine[-depth:] for j, other in enumerate(parts) if j != i
        ):
            depth += 1
        names.append("/".join(mine[-depth:]))
    return names


def _outer(folder: Path) -> Path:
    while _INNER.fullmatch(folder.name) and folder.parent != folder:
        folder = folder.parent
    return folder


def _real(path: Path) -> Path:
    return Path(os.path.abspath(path))
