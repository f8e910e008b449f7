"""Follow a model back through the runs that made it, to the model that the first started from."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlora.model.lineage import FILE, Lineage, fingerprint, looks_local
from unlora.runs.safe_loading import near, read_json

RUN_CONFIG = "run_config.json"


@dataclass(frozen=True)
class History:
    """What a model was made from.

    Attributes:
        runs: the runs that made it, the last one first: folder, config.
        origin: the model that the first of them started from, a folder or a hub repository.
    """

    runs: tuple[tuple[Path, Mapping[str, Any]], ...]
    origin: str

    @classmethod
    def of(cls, path: str, base: str | None = None) -> "History":
        """The history of a run folder; a model of unknown making is its own origin.

        Args:
            base: the model that an adapter is on, where the one it names is not there.

        Raises:
            InputError: a lineage on the way is broken.
        """
        runs: list[tuple[Path, Mapping[str, Any]]] = []
        while (config := run_config(Path(path))) and not any(same(path, f) for f, _ in runs):
            runs.append((Path(path), config))
            path, base = start_of(Path(path), config), config["model"].get("base")
        return cls(tuple(runs), Lineage.read(path, base).root if os.path.isdir(path) else path)

    @property
    def uses_lora(self) -> bool | None:
        """Whether the first run trained an adapter; None where no run is known."""
        return bool(self.runs[-1][1]["model"].get("use_lora")) if self.runs else None


def run_config(folder: Path) -> dict[str, Any] | None:
    """The config of the training run that a folder holds, None where it holds none."""
    try:
        content = read_json(folder / RUN_CONFIG)
        content["model"]["model_args"]["pretrained_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content if isinstance(content, dict) else None


def start_of(folder: Path, config: Mapping[str, Any]) -> str:
    """The model that a run started from; where its folder was moved, as the lineage has it."""
    start = str(config["model"]["model_args"]["pretrained_model_name_or_path"])
    there = os.path.isdir(start) and near(start, folder)
    if there or not looks_local(start) or not (folder / FILE).is_file():
        return start
    lineage = Lineage.parse(folder)
    if len(lineage.links) < 2:
        return lineage.root
    lineage.links[-2].verified()
    return str(lineage.links[-2].path)


def data_sets(data: Mapping[str, Any], *parts: str) -> Iterator[Mapping[str, Any]]:
    """The data sets of some parts of a section ``data``."""
    for part in parts:
        if isinstance(sets := data.get(part), Mapping):
            yield from (data_set for data_set in sets.values() if data_set)


def same(first: str | Path, other: str | Path) -> bool:
    """Whether two paths are the same folder."""
    return Path(first).resolve() == Path(other).resolve()


def same_origin(first: str, other: str) -> bool:
    """Whether two models that others were made from are the same, by name or by content."""
    if first == other or same(first, other):
        return True
    return (
        os.path.isdir(first) and os.path.isdir(other) and fingerprint(first) == fingerprint(other)
    )
