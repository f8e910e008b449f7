"""A run: a folder under ``saves/<mode>/<task_name>`` that says what was run and what came out."""

import json
import logging
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from unlora.errors import InputError

PACKAGES = ("unlora", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers")
SECRET = ("token", "password", "secret", "api_key")
logger = logging.getLogger(__name__)


class Run:
    """One run and its folder.

    Args:
        folder: where everything goes. A finished run that is there already is kept: it moves to
            ``<folder>.previous-<n>``.
        config: the resolved config.
        resumes: whether the run goes on with the checkpoints in the folder.
    """

    def __init__(self, folder: str, config: Mapping[str, Any], *, resumes: bool = False):
        self.folder = Path(folder)
        self.started = time.time()
        self.manifest: dict[str, Any] = {
            "command": " ".join(sys.argv),
            "git_commit": _git_commit(),
            "versions": _versions(),
            "python": platform.python_version(),
            "hardware": _hardware(),
        }
        if is_main_process():
            self._make(resumes)
            write_json(self.folder / "run_config.json", _without_secrets(config))

    def _make(self, resumes: bool) -> None:
        if not resumes and (self.folder / "manifest.json").is_file():
            number = 1
            while (kept := self.folder.with_name(f"{self.folder.name}.previous-{number}")).exists():
                number += 1
            self.folder.rename(kept)
            logger.warning("%s held a finished run; it was kept as %s", self.folder, kept)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"The run folder {str(self.folder)!r} cannot be made: {error.strerror}. "
                "Set paths.output_dir to a folder that can be written."
            ) from error

    def finish(self, **facts: Any) -> None:
        """Write ``manifest.json``; a folder without it holds an unfinished run."""
        self.manifest |= facts
        self.manifest["seconds"] = round(time.time() - self.started, 1)
        self.manifest["peak_memory_bytes"] = peak_memory()
        if is_main_process():
            write_json(self.folder / "manifest.json", self.manifest)


def is_main_process() -> bool:
    """Whether this process writes files; others of the same run only compute."""
    return int(os.environ.get("RANK", "0")) == 0


def write_json(file: Path, content: Any) -> None:
    """Write a file that is either the old or the new one, whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + f".{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2, ensure_ascii=False, default=str)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def peak_memory() -> dict[str, int]:
    """Peak of this process in bytes, and of each GPU where there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            peaks[f"gpu{device}"] = torch.cuda.max_memory_allocated(device)
    return peaks


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _hardware() -> dict[str, Any]:
    hardware: dict[str, Any] = {"machine": platform.machine(), "cores": os.cpu_count()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        hardware["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return hardware


def _git_commit() -> str | None:
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _without_secrets(config: Any) -> Any:
    if isinstance(config, Mapping):
        return {
            key: "(hidden)"
            if isinstance(value, str) and str(key).lower().endswith(SECRET)
            else _without_secrets(value)
            for key, value in config.items()
        }
    if isinstance(config, (list, tuple)):
        return [_without_secrets(value) for value in config]
    return config
