"""Schedule the stages of a study in waves; a wave waits for nothing that is still to be run."""

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unlora.errors import GuardError, InputError
from unlora.studies import stage_fingerprints
from unlora.studies.launchers import Launch
from unlora.studies.stage_run import Record
from unlora.studies.stages import Stage


@dataclass
class Done:
    """What came of the stages.

    Attributes:
        ran: names of the stages that were run now.
        failed: stage -> what went wrong; those that wait for it are not in here.
        finished: names of all stages that are finished.
    """

    ran: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)


def run(stages: Sequence[Stage], folder: Path, launch: Launch, done: Done | None = None) -> Done:
    """Do what is not done yet; what waits for a stage that failed is left out.

    Args:
        done: of earlier plans in the same study; it is added to.
    """
    done = done or Done()
    waiting = [stage for stage in stages if stage.name not in done.finished]
    with _bar(len(waiting)) as bar:
        while ready := [s for s in waiting if done.finished.issuperset(s.needs)]:
            waiting = [stage for stage in waiting if stage not in ready]
            records = [(stage, Record.of(stage, folder)) for stage in ready]
            new = [(s, record) for s, record in records if not _finished(s, record)]
            done.finished |= {stage.name for stage in ready} - {stage.name for stage, _ in new}
            bar.update(len(ready) - len(new))
            with _watched([record for _, record in new], bar):
                errors = _launched(launch, new) if new else []
            for (stage, _), error in zip(new, errors, strict=True):
                done.ran.append(stage.name)
                if error:
                    done.failed[stage.name] = error
                else:
                    done.finished.add(stage.name)
    return done


def _finished(stage: Stage, record: Record) -> bool:
    try:
        return record.finished(stage, stage_fingerprints.key(stage))
    except (InputError, GuardError):  # which the stage itself will say
        return False


def _launched(launch: Launch, new: Sequence[tuple[Stage, Record]]) -> list[str | None]:
    """What went wrong in each; where a launcher breaks down, what is not finished."""
    try:
        return launch(new)
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt(
            "Stopped by Ctrl-C. What is finished is kept: the same command goes on where it was."
        ) from stopped
    except Exception as error:  # a worker that was killed takes the launcher with it
        why = f"its process was lost ({type(error).__name__}); too little memory?"
        if isinstance(error, OSError):
            why = str(error)
        states = [record.read() for _, record in new]
        return [
            None if known.get("state") == "finished" else known.get("error") or why
            for known in states
        ]


def _bar(total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="stage", desc="study", file=sys.stderr, dynamic_ncols=True,
                disable=None)  # fmt: skip


@contextmanager
def _watched(records: Sequence[Record], bar: Any) -> Iterator[None]:
    """Move the bar as the stages of a wave end, wherever they run."""
    over, before = threading.Event(), bar.n

    def show() -> None:
        states = [record.read().get("state") for record in records]
        bar.n = before + sum(state in ("finished", "failed") for state in states)
        bar.refresh()

    def watch() -> None:
        while not over.wait(2):
            show()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        show()
