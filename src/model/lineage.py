"""Where a model comes from: a root model, then every adapter in order.

A run folder with an adapter holds ``lineage.json``:

    {"root": {"path": "Qwen/Qwen2.5-3B-Instruct", "fingerprint": "..."},
     "links": [{"path": "../../finetune/full", "sha256": "..."}, {"path": ".", "sha256": "..."}]}

Local paths are relative to that folder, so that ``saves/`` can be moved as a whole. A link is
found by its path and believed by its hash.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from unlora.errors import InputError

FILE = "lineage.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
EDGE = 1 << 20  # bytes read at both ends of a weight file for a fingerprint


@dataclass(frozen=True)
class Link:
    """One adapter: the folder that holds it and the sha256 of its weights."""

    path: Path
    sha256: str

    def verify(self) -> None:
        """Raises InputError if the adapter is missing or is not the one that was used."""
        weights = self.path / ADAPTER_WEIGHTS
        if not weights.is_file():
            raise InputError(
                f"The lineage needs the adapter {weights}, which is not there. "
                "Put the folder back, or give another model."
            )
        if sha256(weights) != self.sha256:
            raise InputError(
                f"The adapter {weights} is not the one the lineage names: its sha256 has changed "
                f"(expected {self.sha256[:12]}...). It was trained again or edited since. Put the "
                "old one back, or train again from the new one."
            )


@dataclass(frozen=True)
class Lineage:
    """A root model (a folder or a hub repository) and the adapters on it, first to last."""

    root: str
    links: tuple[Link, ...] = ()
    fingerprint: str | None = None

    @classmethod
    def read(cls, path: str) -> "Lineage":
        """The lineage of a run folder, an adapter folder, a model folder or a hub repository.

        Raises:
            InputError: the folder holds no model, or a link is missing or changed.
        """
        folder = Path(path)
        if not folder.is_dir():
            if folder.is_absolute() or path.startswith(".") or Path(folder.parts[0]).is_dir():
                raise InputError(
                    f"There is no folder {path!r} to load a model from. "
                    "Give a run folder, a model folder or a hub repository."
                )
            return cls(path)
        if (folder / FILE).is_file():
            lineage = cls._parse(folder)
        elif (folder / ADAPTER_CONFIG).is_file():
            lineage = cls._of_foreign_adapter(folder)
        elif (folder / "config.json").is_file():
            return cls(path)
        else:
            raise InputError(
                f"The folder {path!r} holds no model: neither config.json nor {ADAPTER_CONFIG}. "
                "Was its training finished?"
            )
        for link in lineage.links:
            link.verify()
        if lineage.fingerprint and os.path.isdir(lineage.root):
            if fingerprint(lineage.root) != lineage.fingerprint:
                raise InputError(
                    f"The root model {lineage.root!r} has changed since {path!r} was trained on "
                    "it. Put the old weights back, or train again."
                )
        return lineage

    @classmethod
    def _parse(cls, folder: Path) -> "Lineage":
        try:
            content = json.loads((folder / FILE).read_text("utf-8"))
            root, links = content["root"], content["links"]
            return cls(
                _from_relative(root["path"], folder) if root.get("local") else root["path"],
                tuple(Link(Path(_from_relative(x["path"], folder)), x["sha256"]) for x in links),
                root.get("fingerprint"),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder / FILE} is not a lineage: {error!r}.") from error

    @classmethod
    def _of_foreign_adapter(cls, folder: Path) -> "Lineage":
        config = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
        base = config.get("base_model_name_or_path")
        weights = folder / ADAPTER_WEIGHTS
        if not base or not weights.is_file():
            missing = "names no base model" if not base else f"holds no {ADAPTER_WEIGHTS}"
            raise InputError(f"The adapter folder {str(folder)!r} {missing}.")
        below = cls.read(base)
        return cls(below.root, (*below.links, Link(folder, sha256(weights))), below.fingerprint)

    @property
    def local_root(self) -> bool:
        """Whether the root model is a folder."""
        return os.path.isdir(self.root)

    def write(self, folder: Path) -> None:
        """Write ``lineage.json`` into the folder whose adapter continues this lineage."""
        root = {
            "path": _to_relative(self.root, folder) if self.local_root else self.root,
            "local": self.local_root,
            "fingerprint": self.fingerprint,
        }
        links = [{"path": _to_relative(x.path, folder), "sha256": x.sha256} for x in self.links]
        links.append({"path": ".", "sha256": sha256(folder / ADAPTER_WEIGHTS)})
        temporary = folder / (FILE + ".tmp")
        temporary.write_text(json.dumps({"root": root, "links": links}, indent=2) + "\n", "utf-8")
        temporary.replace(folder / FILE)

    def __str__(self) -> str:
        return " + ".join([self.root, *(str(link.path) for link in self.links)])


def sha256(file: Path) -> str:
    """Hash of a file's content."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(folder: str) -> str:
    """Tells a model folder from another: its config, and size and both ends of every weight file.

    Root models have gigabytes; reading them whole at every start would cost more than loading.
    """
    digest = hashlib.sha256()
    for file in sorted(_model_files(Path(folder))):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(EDGE))
            if size > EDGE:
                stream.seek(max(EDGE, size - EDGE))
                digest.update(stream.read(EDGE))
    return digest.hexdigest()


def _model_files(folder: Path) -> Iterator[Path]:
    yield from folder.glob("config.json")
    yield from folder.glob("*.safetensors")


def _to_relative(path: str | Path, folder: Path) -> str:
    return os.path.relpath(Path(path).resolve(), folder.resolve())


def _from_relative(path: str, folder: Path) -> str:
    return os.path.relpath((folder / path).resolve())
