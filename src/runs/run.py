"""Open a run: a folder ``saves/<mode>/<task_name>`` with its config, manifest and results."""

import errno
import json
import logging
import math
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

from unlora.errors import InputError, shortened
from unlora.runs.redaction import secrets, without_secrets, without_setting, without_values

PACKAGES = ("unlora", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers")
# what an earlier run leaves and a reader would take for this one's
OF_A_RUN = ("*.json", "*.safetensors", "*.bin", "checkpoint-*", "logs/events.*")
LEFT_OF_A_FULL_DISK = 1 << 16  # bytes
GIB = 1 << 30
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
        _forget_peak_memory()
        self.manifest: dict[str, Any] = {
            "command": _command(),
            "git_commit": _git_commit(),
            "versions": _versions(),
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
        self.manifest |= {"hardware": _hardware(), "seconds": seconds, **facts}
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
        if not full:  # libraries have their own words for it
            with suppress(OSError):
                full = shutil.disk_usage(folder).free < LEFT_OF_A_FULL_DISK
        if not full:
            raise
        raise InputError(
            f"The disk is full: {error}. What was written to {str(folder)!r} before is kept. Free "
            "some space; a training goes on with trainer.args.resume_from_checkpoint=auto."
        ) from error


def is_main_process() -> bool:
    """Whether this process writes files; others of the same run only compute."""
    return int(os.environ.get("RANK") or 0) == 0


def write_json(file: Path, content: Any) -> None:
    """Write a file that is either the old or the new one, whole."""
    content = _finite(content, secrets())
    written = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    write_text(file, written + "\n")


def write_text(file: Path, content: str) -> None:
    """Write a file that is either the old or the new one, whole, with these line ends."""
    write_bytes(file, without_values(content, secrets()).encode("utf-8"))


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file that is either the old or the new one, whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + f".{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        _sync(temporary)
        temporary.replace(file)
        _sync(file.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A folder to write into; on leaving, its files take the place of those in ``folder``.

    Each of them is the old or the new one, whole, at every moment. Where something is raised, all
    are the old ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f".{os.getpid()}.tmp"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        sync_files(new)
        for file in sorted(new.rglob("*")):
            target = folder / file.relative_to(new)
            if file.is_dir():
                target.mkdir(exist_ok=True)
            else:
                file.replace(target)
        _sync(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def files_below(folder: Path, pattern: str) -> list[Path]:
    """The files of this name, in order; folders may come and go meanwhile, as runs write theirs."""
    names = [Path(at, name) for at, _, files in os.walk(folder) for name in files]
    return sorted(file for file in names if fnmatch(file.name, pattern))


def sync_files(folder: Path) -> None:
    """Have the disk keep the files of a folder, also where the machine loses its power now."""
    for file in [*folder.rglob("*"), folder]:
        _sync(file)


def _sync(file: Path) -> None:
    number = os.open(file, os.O_RDONLY)
    try:
        with suppress(OSError) if file.is_dir() else nullcontext():  # not every disk can
            os.fsync(number)
    finally:
        os.close(number)


def _finite(content: Any, hidden: tuple[str, ...]) -> Any:
    """JSON has no NaN: what is not a number is null; and no file has a secret."""
    if isinstance(content, Mapping):
        return {key: _finite(value, hidden) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value, hidden) for value in content]
    if isinstance(content, str):
        return without_values(content, hidden)
    return None if isinstance(content, float) and not math.isfinite(content) else content


def peak_memory() -> dict[str, int]:
    """Peak of this process in bytes since the run began, and of each GPU where there is one.

    Where the system cannot forget a peak (anything but Linux), that of the process since its start.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
        peaks["cpu"] = int(next(x for x in lines if x.startswith("VmHWM:")).split()[1]) * 1024
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            peaks[f"gpu{device}"] = torch.cuda.max_memory_allocated(device)
    return peaks


def memory() -> tuple[int | None, int | None]:
    """Bytes of memory, and of that available now; those of the container, where it has less."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None, None
    available = None
    if (kib := _number_in("/proc/meminfo", "MemAvailable:")) is not None:
        available = kib * 1024
    limit, used = (_number_in(f"/sys/fs/cgroup/memory.{x}") for x in ("max", "current"))
    if limit is not None and limit < total:
        total = limit
        if used is not None:
            available = min(limit - used, available if available is not None else limit)
    return total, available


def _number_in(file: str, label: str = "") -> int | None:
    try:
        words = Path(file).read_text("utf-8").split()
        return int(words[words.index(label) + 1] if label else words[0])
    except (OSError, ValueError, IndexError):
        return None


def in_words(size: int) -> str:
    """Bytes as people read them."""
    for unit, factor in (("GiB", GIB), ("MiB", 1 << 20)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 1024:.0f} KiB"


def _forget_peak_memory() -> None:
    """A process may do several runs, as a study's do."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


def _command() -> str:
    """The command line, as one would type it again."""
    program, *words = sys.argv or [""]
    name = Path(program).name
    start = ["unlora"] if name in ("unlora", "__main__.py") else ["python", program]
    return shlex.join([*start, *map(without_setting, words)])


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _hardware() -> dict[str, Any]:
    hardware: dict[str, Any] = {"machine": platform.machine(), "cores": os.cpu_count()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        hardware["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return hardware


def _git_commit() -> str | None:
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],  # noqa: S607 - the git of whoever runs this
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
