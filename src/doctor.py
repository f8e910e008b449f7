"""What is found on this machine: ``unlora doctor``. Loads no model and changes nothing."""

import importlib
import os
import platform
import shutil
import urllib.error
import urllib.request
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from unlora.cli import refuse_broken_stack
from unlora.errors import InputError

PACKAGES = ("unlora", "torch", "transformers", "peft", "accelerate", "datasets", "lm_eval")
GIB = 1 << 30


def main(argv: Sequence[str]) -> None:
    """Print one line for each finding.

    Raises:
        InputError: the installed packages do not fit together, or there is an argument.
    """
    if set(argv) & {"-h", "--help"}:
        print("usage: unlora doctor\n\nVersions, devices, memory, disk and the hub, as found here.")
        return
    if argv:
        raise InputError(f"unlora doctor takes no arguments, but got: {' '.join(argv)}.")
    print(f"{'python':14}{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        print(f"{package:14}{_version(package)}")
    for what, finding in (
        ("processor", f"{os.cpu_count()} cores, {platform.machine()}"),
        ("memory", _memory()),
        ("gpu", _gpus()),
        ("disk", _disk(Path("saves"))),
        ("hub", _hub()),
    ):
        print(f"{what:14}{finding}")
    refuse_broken_stack()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return "unknown"
    return f"{total / GIB:.1f} GiB"


def _gpus() -> str:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        return f"unknown: {error}"
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return ", ".join(f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB)" for gpu in found)
    if torch.backends.mps.is_available():
        return "Apple (mps)"
    return "none that torch can use; everything runs on the processor"


def _disk(folder: Path) -> str:
    there = next(x for x in (folder.resolve(), *folder.resolve().parents) if x.is_dir())
    writable = "" if os.access(there, os.W_OK) else ", NOT writable"
    return f"{shutil.disk_usage(there).free / GIB:.1f} GiB free for {folder}/{writable}"


def _hub() -> str:
    from huggingface_hub import constants, get_token

    token = "with a token" if get_token() else "without a token"
    if constants.HF_HUB_OFFLINE:
        return f"switched off by HF_HUB_OFFLINE; cache {constants.HF_HUB_CACHE}"
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=5).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError as error:
        reason = getattr(error, "reason", error)
        return f"{constants.ENDPOINT} not reachable ({reason}); cache {constants.HF_HUB_CACHE}"
    return f"{constants.ENDPOINT} reachable, {token}; cache {constants.HF_HUB_CACHE}"
