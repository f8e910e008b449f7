"""Open a run: a folder ``saves/<mode>/<task_name>`` with its config, manifest and results."""

import errno
import logging
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from unlora.errors import InputError, shortened
from unlora.runs.atomic_files import is_main_process, whole_files, write_json
from unlora.runs.machine import (
    forget_peak_memory,
    git_commit,
    machine_facts,
    package_versions,
    peak_memory,
)
from unlora.runs.redaction import without_secrets, without_setting

# what an earlier run leaves and a reader would take for this one's
OF_A_RUN = ("*.json", "*.safetensors", "*.bin", "checkpoint-*", "logs/events.*")
FULL = "The disk is full"
LEFT_OF_A_FULL_DISK = 1 << 16  # bytes
PROGRAM = 700 << 20  # Python with torch, transformers and peft, as measured on x86 Linux
DEVICES = ("/dev", "/proc", "/sys")
MEMORY = Path("/dev/shm")  # noqa: S108 - a disk in memory is none of the devices
logger = logging.getLogger(__name__)


class Run:
    """One run and its folder.

    Args:
        folder: where everything goes.
        config: the resolved config.
        kind: what the files are called: ``manifest.json`` and ``run_config.json`` of a training,
            ``eval_manifest.json`` and ``eval_config.json`` of an evaluation.

    Raises:
        InputError: the folder cannot be made or written.
    """

    def __init__(self, folder: str, config: Mapping[str, Any], *, kind: str = ""):
        self.folder, self.config, self.kind = Path(folder), config, kind
        self.started = time.monotonic()  # the other clock may be set meanwhile
        forget_peak_memory()
        self.manifest: dict[str, Any] = {
            "command": _command(),
            "git_commit": git_commit(),
            "versions": package_versions(),
            "python": platform.python_version(),
        }
        make_writable(self.folder)

    def begin(self, *, fresh: bool) -> None:
        """Write the config; from here on the folder is this run's.

        Args:
            fresh: what the folder holds belongs to an earlier run: it is kept, as
                ``<folder>.previous-<n>``. Nothing of it may be taken for this run's.
        """
        if not is_main_process():
            return
        if fresh:
            previous, own_data = set_aside(self.folder), self.folder / "data"
            if previous and (previous / "data").is_dir() and str(own_data) in str(self.config):
                with whole_files(own_data) as new:  # it is repeated on its own rows
                    shutil.copytree(previous / "data", new, dirs_exist_ok=True)
        name = f"{self.kind}_config.json" if self.kind else "run_config.json"
        write_json(self.folder / name, without_secrets(self.config))

    def finish(self, **facts: Any) -> None:
        """Write the manifest; a folder without it holds an unfinished run."""
        seconds = round(time.monotonic() - self.started, 1)
        self.manifest |= {"hardware": machine_facts(), "seconds": seconds, **facts}
        self.manifest["peak_memory_bytes"] = peak_memory()
        if is_main_process():
            name = f"{self.kind}_manifest.json" if self.kind else "manifest.json"
            write_json(self.folder / name, without_secrets(self.manifest))


def make_writable(
    folder: Path, what: str = "run folder", instead: str = "Set paths.output_dir to"
) -> None:
    """Make a folder, in which everything that is written there stays.

    Args:
        what: what messages call it.
        instead: how another one is given.

    Raises:
        InputError: it cannot be made or written, lies among the devices, or holds a link that
            leads out of it.
    """
    refuse_escapes(folder, what, instead)
    with _unwritable_in_words(folder, what, instead):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass  # a folder that can be made or is there may be read-only all the same


def refuse_unwritable(folder: Path, what: str, instead: str) -> None:
    """What ``make_writable`` refuses, without making the folder."""
    refuse_escapes(folder, what, instead)
    with _unwritable_in_words(folder, what, instead):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass


def refuse_filled(folder: Path) -> None:
    """Raises InputError where something new would be written over something."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{str(folder)!r} is not empty. Give another --output, or remove it.")


@contextmanager
def _unwritable_in_words(folder: Path, what: str, instead: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"The {what} {shortened(folder)!r} cannot be made or written: {error.strerror}. "
            f"{instead} a folder that can be written."
        ) from error


def refuse_escapes(
    folder: Path, what: str = "run folder", instead: str = "Set paths.output_dir to"
) -> None:
    """Raises InputError where what is written into a folder would land elsewhere."""
    try:
        real = Path(os.path.realpath(folder))
    except ValueError as error:  # it holds what no path may
        raise InputError(f"The {what} {shortened(folder)!r} is no path: {error}.") from error
    if (
        any(Path(device) in (real, *real.parents) for device in DEVICES)
        and MEMORY not in real.parents
    ):
        raise InputError(
            f"The {what} {shortened(folder)!r} lies among the devices of the system. {instead} a "
            "folder on a disk."
        )
    for at, folders, files in os.walk(real):
        for path in (Path(at, name) for name in (*folders, *files)):
            target = Path(os.path.realpath(path))
            if path.is_symlink() and real not in target.parents:
                raise InputError(
                    f"{str(folder / path.relative_to(real))!r} is a link to {str(target)!r}, and "
                    f"nothing is written outside the {what}. Remove the link. {instead} another "
                    "folder."
                )


def set_aside(folder: Path) -> Path | None:
    """Keep an earlier run as ``<folder>.previous-<n>``; ``folder`` is empty then.

    What a start has left that came to no checkpoint is removed: there is nothing to keep of it.

    Returns:
        Where it is now; None where there was none.
    """
    left = [path for pattern in OF_A_RUN for path in folder.glob(pattern)]
    if not left:
        return None
    if all(_is_of_a_start(path) for path in left):
        for path in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return None
    # a link stays where it is, and leads to the new run
    run, number = Path(os.path.realpath(folder)) if folder.is_symlink() else folder, 1
    while (previous := run.with_name(f"{run.name}.previous-{number}")).exists():
        number += 1
    run.rename(previous)
    run.mkdir()
    logger.warning("%s held an earlier run; it was kept as %s", folder, previous)
    return previous


def _is_of_a_start(path: Path) -> bool:
    unfinished = path.is_dir() and not (path / "trainer_state.json").exists()
    return path.name == "run_config.json" or path.parent.name == "logs" or unfinished


@contextmanager
def new_run_folder(folder: Path) -> Iterator[None]:
    """Open a folder for a new run; an earlier one is kept, and is back where no run came about."""
    if folder.name in ("", "..") or (folder.exists() and not folder.is_dir()):
        raise InputError(
            f"output_dir is {str(folder)!r}; a run needs a folder of its own: saves/unlearn/NAME."
        )
    make_writable(folder, instead="Set output_dir to")
    there = any(folder.iterdir())
    had_data = (folder / "data").exists()
    previous = set_aside(folder) if there else None
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if not (folder / "run_config.json").is_file():
            if there and previous is None:  # what is no run is the user's, and stays
                if not had_data:
                    shutil.rmtree(folder / "data", ignore_errors=True)
            else:
                shutil.rmtree(folder, ignore_errors=True)
                if previous is not None:
                    previous.rename(folder)
        raise


@contextmanager
def alone(folder: str | Path, kind: str = "") -> Iterator[None]:
    """Keep other processes from running into the same folder, on all machines that share its disk.

    The lock is a file beside the folder, for the folder itself may be set aside. It is free again
    when the process has ended, however it did. Where a run has left nothing, neither file nor
    folders of it stay.

    Raises:
        InputError: another process is at work there.
    """
    from filelock import FileLock, Timeout

    if not is_main_process():  # the others of the same run
        yield
        return
    refuse_escapes(Path(folder))
    run = Path(os.path.abspath(folder))
    name = f".{run.name}.{kind}.lock" if kind else f".{run.name}.lock"
    new = [folder for folder in (run, *run.parents) if not folder.exists()]
    try:
        run.parent.mkdir(parents=True, exist_ok=True)
        inside = not os.access(run.parent, os.W_OK)  # then nothing can be set aside, either
        lock = FileLock(
            (run if inside else run.parent) / name,
            is_singleton=True,
            fallback_to_soft=False,  # a file that would stay when its process is killed
        )
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(
            f"Another process is at work in {str(folder)!r}. Wait for it"
            + ("." if kind == "audit" else ", or give this one another task_name.")
        ) from error
    except (OSError, NotImplementedError) as error:  # some disks know no locks
        logger.warning("%s is not locked against other processes: %s", folder, error)
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):  # a folder that holds something stays
            if not inside:
                run.rmdir()
                # whoever opens it now sees that it is gone, and makes another
                Path(lock.lock_file).unlink()
                for folder in new[1:]:
                    folder.rmdir()
        lock.release()


@contextmanager
def full_disk_in_words(folder: str | Path) -> Iterator[None]:
    """Say in one sentence where something failed because the disk of a run is full.

    Raises:
        InputError: it is.
    """
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if FULL in str(error):  # a stage of this run has said so
            raise
        if not full:  # libraries have their own words for it
            with suppress(OSError):
                full = shutil.disk_usage(folder).free < LEFT_OF_A_FULL_DISK
        if not full:
            raise
        raise InputError(
            f"{FULL}: {' '.join(str(error).split()).rstrip('.')}. What was written to "
            f"{str(folder)!r} before is kept. Free some space there or in "
            f"{tempfile.gettempdir()!r} (TMPDIR), where an evaluation keeps its answers, and give "
            "the same command again; a "
            "training goes on with trainer.args.resume_from_checkpoint=auto."
        ) from error


def _command() -> str:
    """The command line, as one would type it again."""
    program, *words = sys.argv or [""]
    name = Path(program).name
    start = ["unlora"] if name in ("unlora", "__main__.py") else ["python", program]
    return shlex.join([*start, *map(without_setting, words)])
