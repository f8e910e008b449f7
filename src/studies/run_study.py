"""Run a study: target, retain model and every method, over seeds, on one page.

    python src/study.py --config-name=study experiment=study/pocket/lora

For every seed a gold model is trained, which never sees what is to be forgotten, and a target,
which does; then every method starts from that target. Each training and each evaluation is a stage.
What is finished is not run again, what was interrupted goes on, and a changed setting runs again
what depends on it: see :mod:`unlora.studies`.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def run(cfg: Any) -> dict[str, Any]:
    """Do what is not done yet, and write ``summary.json``, ``table.txt`` and the page.

    Returns:
        run -> metric -> ``{"mean", "seeds"}``.

    Raises:
        InputError: the config is wrong, or a stage failed; what is finished is kept.
    """
    from unlora.studies.config import read

    study = read(cfg)
    if study.stage:  # one stage of it, in a process that a launcher started
        from unlora.studies.launchers import job

        return {"error": job(cfg)}

    from unlora.errors import InputError
    from unlora.studies import dry_run, scheduler
    from unlora.studies.audit_stages import with_audits
    from unlora.studies.launchers import launcher
    from unlora.studies.stages import plan
    from unlora.studies.tuning import budget, search

    folder = Path(study.paths.output_dir)
    stages = with_audits(study, plan(study, folder))
    dry_run.check_evaluations(stages)
    if study.dry_run:
        logging.getLogger().setLevel(logging.WARNING)  # the plan is all that is wanted
        print(dry_run.as_text(study, stages, folder))
        return {}
    with _alone(folder):
        launch, done = launcher(cfg, study.workers), scheduler.Done()
        trials: list[dict[str, Any]] = []
        if study.search["trials"]:
            best, trials = search(study, folder, launch, done)
            study = study.model_copy(update={"methods": {k: list(v) for k, v in best.items()}})
            stages = with_audits(study, plan(study, folder))
        scheduler.run(stages, folder, launch, done)
        results = _written(stages, folder, done, trials, budget(study) if trials else None)
    left = [stage for stage in stages if stage.name not in done.finished]
    print(f"\n{len(done.ran)} stages were run, {len(done.finished) - _num_ok(done)} were finished "
          f"before.\nEverything is in {folder}")  # fmt: skip
    if left:
        raise InputError(_failures(left, done.failed, folder))
    return results


def _num_ok(done: Any) -> int:
    return sum(name not in done.failed for name in done.ran)


def _written(
    stages: Sequence[Any],
    folder: Path,
    done: Any,
    trials: Sequence[Mapping[str, Any]],
    budget: str | None,
) -> dict[str, Any]:
    """The figures of all evaluations that are finished, as files."""
    from unlora import report
    from unlora.report import audits
    from unlora.report.runs import Entry
    from unlora.report.table import text_table
    from unlora.runs.atomic_files import write_json, write_text

    order = {"target": 0, "gold": 1, "method": 2}
    evaluated = sorted(
        (stage for stage in stages if stage.kind == "eval" and stage.name in done.finished),
        key=lambda stage: order[stage.role],
    )
    if not evaluated:
        return {}
    entries = [Entry(s.run, s.role, Path(s.folder), s.seed) for s in evaluated]
    read = report.compare(entries)
    results = {row.name: row.figures() | audits.figures(row) for row in read.rows}
    table = text_table(read)
    write_json(folder / "summary.json", results)
    write_text(folder / "table.txt", table + "\n")
    failed = [f"{s.title}: {done.failed[s.name]}" for s in stages if s.name in done.failed]
    description = _description(evaluated, folder) | {
        "trials": list(trials), "budget": budget, "missing": failed,
    }  # fmt: skip
    write_json(folder / "study.json", description)
    page = report.write(
        folder, read, title=folder.name, trials=trials, budget=budget, missing=failed
    )
    print(f"\n{table}\n\nThe page: {page}")
    return results


def _description(evaluated: Sequence[Any], folder: Path) -> dict[str, Any]:
    """What ``unlora report`` reads of a study."""
    runs = [
        {
            "run": stage.run,
            "role": stage.role,
            "seed": stage.seed,
            "folder": Path(stage.folder).relative_to(folder).as_posix(),
        }
        for stage in evaluated
    ]
    return {"name": folder.name, "runs": runs}


def _failures(left: Sequence[Any], failed: Mapping[str, str], folder: Path) -> str:
    """What is not finished, and why, a line each."""
    lines = [f"{stage.title}: {failed[stage.name]}" for stage in left if stage.name in failed]
    waiting = [stage.title for stage in left if stage.name not in failed]
    if waiting:
        lines.append(f"Not run, as they wait for those: {', '.join(waiting)}.")
    lines.append(
        f"The logs are in {folder / 'stages'}. The same command runs again what is not finished."
    )
    return "\n".join(lines)


def _alone(folder: Path) -> Any:
    """The study's lock.

    Raises:
        InputError: another process holds it.
    """
    from filelock import FileLock, Timeout

    from unlora.errors import InputError
    from unlora.runs.run import make_writable

    make_writable(folder, "folder of the study")
    lock = FileLock(folder / "study.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(
            f"Another process is at work on the study in {folder}. Wait for it, or give this one "
            "another task_name."
        ) from error
