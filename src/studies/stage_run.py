"""Run one stage, unless it is finished."""

import contextlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from unlora.cli.command_words import as_command, word
from unlora.errors import GuardError, InputError
from unlora.runs.atomic_files import write_json, write_text
from unlora.runs.hashes import sha256
from unlora.runs.redaction import guard_logs, safe, traceback_of
from unlora.runs.run import set_aside
from unlora.runs.safe_loading import read_json
from unlora.studies import audit_stages
from unlora.studies import stage_fingerprints as content
from unlora.studies.stages import Stage

BELONGS = "stage.key"  # in a run folder: the key of what is in it


@dataclass(frozen=True)
class Record:
    """What is known of a stage: ``stages/<name>.json`` in the folder of the study.

    The file holds the stage, its key, ``state`` (``waiting``, ``begun``, ``finished``, ``failed``),
    when it was ``started`` last and the ``seconds`` that took, the ``error`` in words, and the
    hashes of its ``outputs``.
    """

    file: Path

    @classmethod
    def of(cls, stage: Stage, study_folder: Path) -> "Record":
        """The record of a stage, which may not be there yet."""
        return cls(study_folder / "stages" / f"{stage.name}.json")

    def read(self) -> dict[str, Any]:
        """Its content; a damaged file says nothing."""
        try:
            content: dict[str, Any] = read_json(self.file)
            return content if isinstance(content, dict) else {}
        except (OSError, ValueError):
            return {}

    def write(self, stage: Stage, **facts: Any) -> None:
        """Replace what is known."""
        write_json(self.file, {"stage": stage.as_dict(), **facts})

    def finished(self, stage: Stage, key: str) -> bool:
        """Whether the stage was done with these inputs, and what it left is still the same."""
        known = self.read()
        if known.get("state") != "finished" or known.get("key") != key:
            return False
        left: dict[str, str] = known.get("outputs") or {}
        there = _outputs(stage)
        return bool(left) and all(
            name in there and sha256(there[name]) == hash for name, hash in left.items()
        )

    @property
    def log(self) -> Path:
        """Everything that the stage prints."""
        return self.file.with_suffix(".log.txt")


def do(stage: Stage, record: Record) -> str | None:
    """Do a stage unless it is done; its output goes to the log.

    Where two processes would do the same stage, one of them waits and finds it done.

    Returns:
        What went wrong, in words.
    """
    record.file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(record.file.with_suffix(".lock")), output_to(record.log) as terminal:
        facts: dict[str, Any] = {"started": round(time.time(), 1)}
        try:
            facts["key"] = key = content.key(stage)
            if record.finished(stage, key):
                return None
            record.write(stage, state="begun", **facts)
            _run(stage, key)
            left = {name: sha256(file) for name, file in _outputs(stage).items()}
            facts |= {"state": "finished", "outputs": left}
        except (InputError, GuardError) as mistake:
            why = safe(str(mistake)) + "\n"
            facts |= {"state": "failed", "error": str(mistake)}
        except Exception as mistake:
            why = traceback_of(mistake)
            facts |= {"state": "failed", "error": f"{type(mistake).__name__}: {mistake}"}
        seconds, error = round(time.time() - facts["started"], 1), facts.get("error")
        # a disk that is too full to write down what went wrong must not hide it
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():
            print(why if error else "", end="", file=sys.stderr)
            record.write(stage, seconds=seconds, **facts)
        terminal(f"  {stage.title}: {f'FAILED: {error}' if error else f'{seconds:.0f} s'}")
    return error


def _outputs(stage: Stage) -> dict[str, Path]:
    """What a stage left, by name within its folder, which may be moved."""
    folder = Path(stage.folder)
    return {file.relative_to(folder).as_posix(): file for file in content.outputs(stage)}


def _run(stage: Stage, key: str) -> None:
    """Train or evaluate in this process."""
    from unlora.recipes import evaluate as evaluation
    from unlora.recipes import train
    from unlora.trainer.checkpoints import whole_checkpoints

    guard_logs()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
    if stage.kind in ("audit", "dial"):
        audit_stages.run(stage)
        return
    config = content.config_of(stage)
    if stage.kind == "eval":
        for log in content.outputs(stage):  # of suites that are not asked any more
            log.unlink()
        evaluation.run(config)
        return
    folder = Path(stage.folder)
    if belongs_to(folder, key) and whole_checkpoints(folder):
        config["trainer"]["args"]["resume_from_checkpoint"] = True
    else:
        _make_room(folder, key)
    with as_command(sys.argv if stage.role == "request" else _command(stage)):
        train.run(config, evaluate=False)
    if content.keeps_no_checkpoints(content.training_args(stage)):  # they were ours
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def belongs_to(folder: Path, key: str) -> bool:
    """Whether what is in a run folder was made for this key, finished or not."""
    file = folder / BELONGS
    return file.is_file() and file.read_text("utf-8") == key


def _make_room(folder: Path, key: str) -> None:
    """A run folder for this key; what was made for another is kept beside it."""
    if belongs_to(folder, key) and not (folder / "manifest.json").exists():
        shutil.rmtree(folder)  # it was stopped before its first checkpoint
    elif folder.is_dir():
        set_aside(folder)
    write_text(folder / BELONGS, key)


def _command(stage: Stage) -> list[str]:
    """What one would type to train the same."""
    set_here = {**stage.params, "trainer.args.seed": stage.seed, "paths.output_dir": stage.folder}
    if stage.model:
        set_here["model.model_args.pretrained_model_name_or_path"] = stage.model
    name = "unlearn" if stage.config == "unlearn" else "train"
    words = [word(key, value) for key, value in set_here.items()]
    return ["unlora", name, *stage.overrides, *words]


@contextlib.contextmanager
def output_to(file: Path) -> Iterator[Any]:
    """Append everything that is printed, progress bars included, to a file.

    Yields:
        A function that prints a line where the output went before.
    """
    with open(file, "a", encoding="utf-8") as stream:
        streams = [os.dup(1), os.dup(2)]
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(stream.fileno(), 1), os.dup2(stream.fileno(), 2)
        try:
            yield lambda line: os.write(streams[1], f"{line}\n".encode())
        finally:
            with contextlib.suppress(OSError):  # the disk may be full
                sys.stdout.flush(), sys.stderr.flush()
            for number, old in enumerate(streams, start=1):
                os.dup2(old, number)
                os.close(old)
