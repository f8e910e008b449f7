"""Read and write the lineage of a model: a root model, then every adapter in order.

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
import os
from dataclasses import dataclass
from pathlib import Path

from unlora.errors import InputError
from unlora.model.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapter_settings,
    check_adapter,
    settings_hash,
    settings_hash_before,
)
from unlora.model.weight_files import check_model_files
from unlora.runs.atomic_files import write_json
from unlora.runs.hashes import sha256
from unlora.runs.safe_loading import near, read_json, trusted

FILE = "lineage.json"
SAY_WHERE = "say where it is with model.base=FOLDER (unlora export: --base FOLDER)"


@dataclass(frozen=True)
class Link:
    """One adapter: the folder that holds it, and the hashes of its weights and settings."""

    path: Path
    sha256: str
    config_sha256: str

    @classmethod
    def of(cls, folder: Path, *, merging: bool = False) -> "Link":
        """The link that an adapter folder is now.

        Raises:
            InputError: it holds no adapter, or one that cannot be read exactly.
        """
        settings = check_adapter(folder, merging=merging)
        return cls(folder, sha256(folder / ADAPTER_WEIGHTS), settings_hash(settings))

    def verified(self) -> "Link":
        """The adapter as it is now.

        Raises:
            InputError: it is missing or is not the one that was used.
        """
        now = Link.of(self.path)
        known = (now.config_sha256, settings_hash_before(adapter_settings(self.path)))
        for what, changed in (
            (ADAPTER_WEIGHTS, now.sha256 != self.sha256),
            (ADAPTER_CONFIG, self.config_sha256 not in known),
        ):
            if changed:
                raise InputError(
                    f"The adapter {self.path / what} is not the one the lineage names: its sha256 "
                    "has changed. It was trained again or edited since. Put the old one back, or "
                    "train again from the new one."
                )
        return now


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
    def read(
        cls,
        path: str,
        base: str | None = None,
        *,
        merging: bool = False,
        above: tuple[Path, ...] = (),
    ) -> "Lineage":
        """The lineage of a run folder, an adapter folder, a model folder or a hub repository.

        Args:
            base: the model that the adapter belongs on, where the one it names is not there.
            merging: it is only to be written into full weights, so it may be more than LoRA.
            above: adapters that name this as their base model.

        Raises:
            InputError: the folder holds no model, or a link or the root is missing or changed.
        """
        folder = Path(path)
        if not folder.is_dir() and looks_local(path):
            raise InputError(
                f"There is no folder {path!r} to load a model from. "
                "Give a run folder, a model folder or a hub repository."
            )
        if base and not any((folder / file).is_file() for file in (FILE, ADAPTER_CONFIG)):
            raise InputError(
                f"The base model {base!r} is given for {path!r}, which is no folder of an adapter. "
                "Leave it out, or give the adapter's folder as the model."
            )
        if not folder.is_dir():
            return cls(path)
        if (folder / FILE).is_file():
            lineage = cls.parse(folder, base)
        elif (folder / ADAPTER_CONFIG).is_file():
            lineage = cls._of_foreign_adapter(folder, base, merging, above)
        elif (folder / "config.json").is_file():
            check_model_files(folder)
            return cls(path)
        else:
            inside = sorted(str(file.parent) for file in folder.glob(f"*/{ADAPTER_CONFIG}"))
            raise InputError(
                f"The folder {path!r} holds no model: neither config.json nor {ADAPTER_CONFIG}. "
                + (f"Give one of {inside[:6]}." if inside else "Was its training finished?")
            )
        if not (folder / FILE).is_file():
            return lineage
        links = tuple(link.verified() for link in lineage.links)
        lineage = cls(lineage.root, links, lineage.fingerprint)
        lineage.refuse_late_dora()
        if lineage.local_root:
            if lineage.fingerprint and fingerprint(lineage.root) != lineage.fingerprint:
                raise InputError(
                    f"The root model {lineage.root!r} has changed since {path!r} was trained on "
                    "it. Put the old weights back, or train again."
                )
            check_model_files(Path(lineage.root))
        return lineage

    def refuse_late_dora(self) -> None:
        """Raises InputError where DoRA stands on other adapters: it scales the weights below."""
        for link in self.links[1:]:
            if adapter_settings(link.path).get("use_dora"):
                raise InputError(
                    f"The adapter {str(link.path)!r} has use_dora and stands on another one. DoRA "
                    "scales the weights that it was trained on, which are nowhere as they were "
                    "then. Export what it stands on with `unlora export --merged`, and train again "
                    "from that."
                )

    @classmethod
    def parse(cls, folder: Path, base: str | None = None) -> "Lineage":
        """What ``lineage.json`` in a folder says, without believing it.

        Args:
            base: where the root model is now.

        Raises:
            InputError: it is not a lineage, or names a root folder that is not there.
        """
        try:
            content = read_json(folder / FILE)
            root, links = content["root"], content["links"]
            path = root["path"]
            _refuse_absolute(folder, [path, *(x["path"] for x in links)])
            if base:
                path = base
            elif root["local"]:
                path = _from_relative(path, folder)
                if not os.path.isdir(path) and os.path.isdir(root["given"]):
                    path = root["given"]
            known = base or (root["local"] and root.get("fingerprint"))  # then its content decides
            if os.path.isdir(path) and not known and not near(path, folder):
                raise InputError(
                    f"{folder / FILE} names the root model {path!r}, outside of the folders that "
                    "the run is in and without a hash by which it could be known. Copy the model "
                    f"beside the run, or type {trusted(path)} before the command."
                )
            if root["local"] and not os.path.isdir(path):
                raise InputError(
                    f"The root model of {str(folder)!r} is not there: neither {path!r} nor "
                    f"{root['given']!r} is a folder. Put it back, or {SAY_WHERE}."
                )
            parsed = tuple(
                Link(Path(_from_relative(x["path"], folder)), x["sha256"], x["config_sha256"])
                for x in links
            )
            # a copy of a hub model is not known by its commit
            copy = base and not root["local"]
            return cls(path, parsed, None if copy else root.get("fingerprint"))
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{str(folder / FILE)!r} is not a lineage ({error!r}). Put back the one that was "
                "written when the adapter was trained."
            ) from error

    @classmethod
    def _of_foreign_adapter(
        cls, folder: Path, base: str | None, merging: bool, above: tuple[Path, ...]
    ) -> "Lineage":
        settings, above = adapter_settings(folder), (*above, folder)
        named = base or str(settings.get("base_model_name_or_path") or "")
        if not named:
            raise InputError(
                f"The adapter folder {str(folder)!r} names no base model. Write its path or "
                f"repository as base_model_name_or_path into {ADAPTER_CONFIG}, or {SAY_WHERE}."
            )
        if os.path.isdir(named) and any(os.path.samefile(named, link) for link in above):
            raise InputError(
                f"The adapter in {str(folder)!r} names itself as its base model, or one that "
                "stands on it. Write the model that it was trained on as "
                f"base_model_name_or_path into {ADAPTER_CONFIG}."
            )
        if not os.path.isdir(named) and looks_local(named):
            raise InputError(
                f"The adapter {str(folder)!r} belongs on {named!r}, as its {ADAPTER_CONFIG} says, "
                f"and there is no such folder. Put the model back, or {SAY_WHERE}."
            )
        if os.path.isdir(named) and not base and not near(named, folder):
            raise InputError(
                f"The adapter in {str(folder)!r} names the base model {named!r}, outside of the "
                f"folders that it is in. Copy one beside the other, or {SAY_WHERE}, or type "
                f"{trusted(named)} before the command."
            )
        below = cls.read(named, above=above)
        link = Link.of(folder, merging=merging)
        commit = None if below.links or below.local_root else settings.get("revision")
        lineage = cls(below.root, (*below.links, link), below.fingerprint or commit)
        lineage.refuse_late_dora()
        return lineage

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
    return sha256(file)


def _to_relative(path: str | Path, folder: Path) -> str:
    return os.path.relpath(Path(path).resolve(), folder.resolve())


def _from_relative(path: str, folder: Path) -> str:
    return os.path.relpath((folder / path).resolve())
