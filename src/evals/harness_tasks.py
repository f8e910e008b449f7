"""Find the lm-evaluation-harness tasks that a config names: its own, or YAML in local folders."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlora.errors import InputError
from unlora.registry import unknown


@dataclass(frozen=True)
class Tasks:
    """What lm-eval's ``simple_evaluate`` is to ask.

    Attributes:
        asked: tasks and groups, their data read.
        manager: lm-eval's index of all names, which takes seconds to make anew.
    """

    asked: list[Any]
    manager: Any


@contextmanager
def code_of_lm_eval_only(name: str) -> Iterator[None]:
    """No function that a YAML outside of the package names (``!function``) is imported.

    Raises:
        InputError: one is named.
    """
    import lm_eval
    from lm_eval.tasks import _yaml_loader

    package = Path(lm_eval.__file__).resolve().parent
    load = _yaml_loader._import_func_in_yml

    def checked(function: str, folder: Path) -> Any:
        if package not in Path(folder).resolve().parents:
            raise InputError(
                f"eval.{name}: the tasks in {str(folder)!r} name code, !function {function}, which "
                "is not run. If you trust it, set "
                f"eval.{name}.simple_evaluate_args.confirm_run_unsafe_code=true."
            )
        return load(function, folder)

    _yaml_loader._import_func_in_yml = checked
    try:
        yield
    finally:
        _yaml_loader._import_func_in_yml = load


def load_tasks(
    name: str, tasks: Sequence[str], folders: Sequence[str], *, run_code: bool = False
) -> Tasks:
    """Tasks and groups with their data: from local folders alone where these have them all.

    Args:
        run_code: whether functions beside tasks of one's own may be called.

    Raises:
        InputError: there is no such task, its data cannot be read, or it would run code.
    """
    with nullcontext() if run_code else code_of_lm_eval_only(name):
        return _load_tasks(name, tasks, folders)


def _load_tasks(name: str, tasks: Sequence[str], folders: Sequence[str]) -> Tasks:
    from lm_eval.tasks import TaskManager

    # the 14,000 names that come with the package take seconds to read
    manager = TaskManager(include_path=list(folders), include_defaults=False)
    if _missing(tasks, manager):
        manager = TaskManager(include_path=list(folders))
    for task in tasks:
        if task not in manager.all_tasks and not Path(task).is_file():
            raise InputError(_unknown_task(name, task, manager.all_tasks, bool(folders)))
    try:
        loaded = [entry for task in tasks for entry in _first(manager.load([task]))]
        manager.load(loaded)  # refuses a task given twice
    except InputError:
        raise
    except Exception as error:  # whatever the readers of data sets raise
        reason = f"{type(error).__name__}: {error}"
        if missing := set(_missing(tasks, manager)) - set(tasks):
            reason = f"a group names {min(missing)!r}, which is no task"
        raise InputError(f"eval.{name}: the tasks cannot be read: {reason}") from error
    return Tasks(loaded, manager)


def _missing(tasks: Sequence[str], manager: Any) -> list[str]:
    """Which of these tasks, and of those that their groups name, nobody has defined."""
    missing = []
    for task in tasks:
        entry = manager.task_index.get(task)
        if entry is None:
            missing.append(task)
        elif task in manager.all_groups:
            named = [member for member in entry.cfg.get("task", ()) if isinstance(member, str)]
            missing += _missing(named, manager)
    return missing


def _unknown_task(name: str, task: str, known: Sequence[str], own: bool) -> str:
    """The message for a task nobody defined; the package knows too many to list them all."""
    text = unknown(f"task in eval.{name}.tasks", task, known).partition(" Known: ")[0]
    where = f"eval.{name}.simple_evaluate_args.include_path"
    return f"{text} lm-eval itself and the folders of {where} have none of that name." if own else (
        f"{text} lm-eval has none of that name; for tasks of your own set {where} to their folder."
    )  # fmt: skip


def _first(loaded: Mapping[str, Any]) -> list[Any]:
    """What was asked for: a group, else a task, or the tasks of a tag."""
    return list(loaded["groups"].values())[:1] or list(loaded["tasks"].values())
