"""Ask the machine: memory and its peak, hardware, package versions, the git commit."""

import os
import platform
import resource
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("unlora", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers")
GIB = 1 << 30


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


def forget_peak_memory() -> None:
    """A process may do several runs, as a study's do."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


def package_versions() -> dict[str, str]:
    """The versions of what the figures of a run depend on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def machine_facts() -> dict[str, Any]:
    """What a manifest says of the machine."""
    hardware: dict[str, Any] = {"machine": platform.machine(), "cores": os.cpu_count()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        hardware["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return hardware


def git_commit() -> str | None:
    """The commit of this package, where it is run from its repository."""
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
