"""Write files whole: each is the old or the new one at every moment, and none has a secret."""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import Any

from unlora.runs.redaction import secrets, without_values


def is_main_process() -> bool:
    """Whether this process writes files; others of the same run only compute."""
    return int(os.environ.get("RANK") or 0) == 0


def write_json(file: Path, content: Any) -> None:
    """Write a file that is either the old or the new one, whole."""
    hidden = secrets()
    encoder = json.JSONEncoder(indent=2, ensure_ascii=False, default=str)
    # piece by piece: the text of a large log takes more memory than what it says
    pieces = chain(encoder.iterencode(_finite(content, hidden)), ["\n"])
    with _new(file) as new, new.open("wb") as stream:
        stream.writelines(without_values(piece, hidden).encode("utf-8") for piece in pieces)


def write_text(file: Path, content: str) -> None:
    """Write a file that is either the old or the new one, whole, with these line ends."""
    write_bytes(file, without_values(content, secrets()).encode("utf-8"))


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file that is either the old or the new one, whole."""
    with _new(file) as new:
        new.write_bytes(content)


@contextmanager
def _new(file: Path) -> Iterator[Path]:
    """A file to write, which on leaving takes the place of this one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + f".{os.getpid()}.tmp")
    try:
        yield temporary
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


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into; on leaving, it takes the place of ``folder``, missing or empty.

    Where something is raised, nothing of it stays.
    """
    real = folder.resolve()
    temporary = real.with_name(real.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        sync_files(temporary)
        temporary.replace(real)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
