"""Where a model comes from: a root model, then every adapter in order.

A run folder with an adapter holds ``lineage.json``:

    {"root": {"path": "Qwen/Qwen2.5-3B-Instruct", "local": false, "fingerprint": "<commit>"},
     "links": [{"path": "../../finetune/full", "sha256": "...", "config_sha256": "..."},
               {"path": ".", "sha256": "...", "config_sha256": "..."}]}

Local paths are relative to that folder, so that ``saves/`` can be moved as a whole. A link is
found by its path and believed by its hashes: of its weights, and of the settings that say what the
weights mean. A root on the hub is believed by its commit, a local one by the hash of its files.
"""

import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlora.errors import InputError
from unlora.model.files import check_adapter, check_model_files
from unlora.run import write_json
from unlora.trust import near, read_json, refuse_pickle

FILE = "lineage.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# keys of adapter_config.json that change what the model answers
MEANING = (
    "alpha_pattern", "fan_in_fan_out", "layers_pattern", "layers_to_transform", "lora_alpha",
    "peft_type", "r", "rank_pattern", "target_modules", "use_dora", "use_rslora",
)  # fmt: skip


@dataclass(frozen=True)
class Link:
    """One adapter: the folder that holds it, and the hashes of its weights and settings."""

    path: Path
    sha256: str
    config_sha256: str

    @classmethod
    def of(cls, folder: Path) -> "Link":
        """The link that an adapter folder is now.

        Raises:
            InputError: it holds no adapter.
        """
        if folder.is_dir():
            refuse_pickle(folder, ADAPTER_WEIGHTS)
        for file in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
            if not (folder / file).is_file():
                raise InputError(
                    f"The lineage needs the adapter {folder / file}, which is not there. "
                    "Put the folder back, or give another model."
                )
        config = adapter_config(folder)
        check_adapter(folder / ADAPTER_WEIGHTS, config)
        meaning = {key: config.get(key) for key in MEANING}
        if isinstance(meaning["target_modules"], list):
            meaning["target_modules"] = sorted(meaning["target_modules"])
        text = json.dumps(meaning, sort_keys=True)
        return cls(
            folder,
            _sha256(folder / ADAPTER_WEIGHTS),
            hashlib.sha256(text.encode()).hexdigest(),
        )

    def verify(self) -> None:
        """Raises InputError if the adapter is missing or is not the one that was used."""
        now = Link.of(self.path)
        for what, changed in (
            (ADAPTER_WEIGHTS, now.sha256 != self.sha256),
            (ADAPTER_CONFIG, now.config_sha256 != self.config_sha256),
        ):
            if changed:
                raise InputError(
                    f"The adapter {self.path / what} is not the one the lineage names: its sha256 "
                    "has changed. It was trained again or edited since. Put the old one back, or "
                    "train again from the new one."
                )


@dataclass(frozen=True)
class Lineage:
    """A root model (a folder or a hub repository) and the adapters on it, first to last.

    Attributes:
        fingerprint: of the root: its commit on the hub, or a sha256 over the files of the folder.
    """

    root: str
    links: tuple[Link, ...] = ()
    fingerprint: str | None = None

    @classmethod
    def read(cls, path: str, *, above: tuple[Path, ...] = ()) -> "Lineage":
        """The lineage of a run folder, an adapter folder, a model folder or a hub repository.

        Args:
            above: adapters that name this as their base model.

        Raises:
            InputError: the folder holds no model, or a link or the root is missing or changed.
        """
        folder = Path(path)
        if not folder.is_dir():
            if looks_local(path):
                raise InputError(
                    f"There is no folder {path!r} to load a model from. "
                    "Give a run folder, a model folder or a hub repository."
                )
            return cls(path)
        if (folder / FILE).is_file():
            lineage = cls.parse(folder)
        elif (folder / ADAPTER_CONFIG).is_file():
            lineage = cls._of_foreign_adapter(folder, above)
        elif (folder / "config.json").is_file():
            check_model_files(folder)
            return cls(path)
        else:
            raise InputError(
                f"The folder {path!r} holds no model: neither config.json nor {ADAPTER_CONFIG}. "
                "Was its training finished?"
            )
        for link in lineage.links:
            link.verify()
        if lineage.fingerprint and lineage.local_root:
            if fingerprint(lineage.root) != lineage.fingerprint:
                raise InputError(
                    f"The root model {lineage.root!r} has changed since {path!r} was trained on "
                    "it. Put the old weights back, or train again."
                )
        if lineage.local_root:
            check_model_files(Path(lineage.root))
        return lineage

    @classmethod
    def parse(cls, folder: Path) -> "Lineage":
        """What ``lineage.json`` in a folder says, without believing it.

        Raises:
            InputError: it is not a lineage, or names a root folder that is not there.
        """
        try:
            content = read_json(folder / FILE)
            root, links = content["root"], content["links"]
            path = root["path"]
            _refuse_absolute(folder, [path, *(x["path"] for x in links)])
            if root["local"]:
                path = _from_relative(path, folder)
                if not os.path.isdir(path) and os.path.isdir(root["given"]):
                    path = root["given"]
            known = root["local"] and root.get("fingerprint")  # then its content decides
            if os.path.isdir(path) and not known and not near(path, folder):
                raise InputError(
                    f"{folder / FILE} names the root model {path!r}, outside of the folders that "
                    "the run is in and without a hash by which it could be known. Copy the model "
                    "beside the run, or name its folder in UNLORA_MODELS."
                )
            if root["local"]:
                if not os.path.isdir(path):
                    raise InputError(
                        f"The root model of {str(folder)!r} is not there: neither {path!r} nor "
                        f"{root['given']!r} is a folder. Put it back, or give another model."
                    )
            found = tuple(
                Link(Path(_from_relative(x["path"], folder)), x["sha256"], x["config_sha256"])
                for x in links
            )
            return cls(path, found, root.get("fingerprint"))
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{str(folder / FILE)!r} is not a lineage ({error!r}). Put back the one that was "
                "written when the adapter was trained."
            ) from error

    @classmethod
    def _of_foreign_adapter(cls, folder: Path, above: tuple[Path, ...]) -> "Lineage":
        base = adapter_config(folder).get("base_model_name_or_path")
        if not base:
            raise InputError(
                f"The adapter folder {str(folder)!r} names no base model. Write its path or "
                f"repository as base_model_name_or_path into {ADAPTER_CONFIG}."
            )
        above, base = (*above, folder), str(base)
        if os.path.isdir(base) and any(os.path.samefile(base, one) for one in above):
            raise InputError(
                f"The adapter in {str(folder)!r} names itself as its base model, or one that "
                "stands on it. Write the model that it was trained on as "
                f"base_model_name_or_path into {ADAPTER_CONFIG}."
            )
        if os.path.isdir(base) and not near(base, folder):
            raise InputError(
                f"The adapter in {str(folder)!r} names the base model {base!r}, outside of the "
                "folders that it is in. Copy one beside the other, or name the model's folder in "
                "UNLORA_MODELS."
            )
        below = cls.read(base, above=above)
        return cls(below.root, (*below.links, Link.of(folder)), below.fingerprint)

    @property
    def local_root(self) -> bool:
        """Whether the root model is a folder."""
        return os.path.isdir(self.root)

    @property
    def folders(self) -> list[Path]:
        """Every folder that the model is read from."""
        return [Path(self.root)] * self.local_root + [link.path for link in self.links]

    def write(self, folder: Path) -> None:
        """Write ``lineage.json`` into the folder whose adapter continues this lineage."""
        root = {
            "path": _to_relative(self.root, folder) if self.local_root else self.root,
            "given": self.root,
            "local": self.local_root,
            "fingerprint": self.fingerprint,
        }
        links = [
            {
                "path": _to_relative(link.path, folder),
                "sha256": link.sha256,
                "config_sha256": link.config_sha256,
            }
            for link in (*self.links, Link.of(folder))
        ]
        write_json(folder / FILE, {"root": root, "links": links})

    def __str__(self) -> str:
        return " + ".join([self.root, *(str(link.path) for link in self.links)])


def adapter_config(folder: Path) -> dict[str, Any]:
    """The settings of an adapter.

    Raises:
        InputError: they are not JSON.
    """
    try:
        content: dict[str, Any] = read_json(folder / ADAPTER_CONFIG)
        if not isinstance(content, dict):
            raise ValueError(f"{type(content).__name__} where keys and values should be")
    except ValueError as error:
        raise InputError(
            f"{str(folder / ADAPTER_CONFIG)!r} holds no settings of an adapter ({error}). Download "
            "or copy it again."
        ) from error
    if content.get("megatron_config"):  # peft would import the module that stands beside it
        raise InputError(
            f"{folder / ADAPTER_CONFIG} has a megatron_config, which this program does not load."
        )
    return content


def _refuse_absolute(folder: Path, paths: list[str]) -> None:
    for path in paths:
        if os.path.isabs(path):
            raise InputError(
                f"{folder / FILE} names {path!r}. The paths in it must be relative to its folder, "
                "as this program writes them."
            )


def looks_local(path: str) -> bool:
    """Whether a path that is no folder was meant as one, and not as a hub repository."""
    parts = Path(path).parts
    if path.startswith((".", "/", "~")) or len(parts) > 2:
        return True
    return len(parts) == 2 and Path(parts[0]).is_dir()


def fingerprint(folder: str) -> str:
    """sha256 over the config and all weight files of a model folder."""
    files = sorted(
        file
        for pattern in ("config.json", "*.safetensors", "*.bin")
        for file in Path(folder).glob(pattern)
        if file.is_file()
    )
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file.name}:{_sha256_of(file, stat.st_size, stat.st_mtime_ns)};".encode())
    return digest.hexdigest()


@functools.cache
def _sha256_of(file: Path, _size: int, _changed: int) -> str:
    """Read a file again only if it has another size or time than before."""
    return _sha256(file)


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _to_relative(path: str | Path, folder: Path) -> str:
    return os.path.relpath(Path(path).resolve(), folder.resolve())


def _from_relative(path: str, folder: Path) -> str:
    return os.path.relpath((folder / path).resolve())
