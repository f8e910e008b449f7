"""Read folders as the library ``datasets`` and the hub lay them out."""

import json
import re
from glob import escape
from pathlib import Path
from typing import Any

from unlora.data.files import SUFFIXES
from unlora.errors import InputError

STATE, SPLITS = "state.json", "dataset_dict.json"  # what save_to_disk writes
SHARD = re.compile(r".+-(\d{5})-of-(\d{5})")


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` has written this folder."""
    return (folder / STATE).is_file() or (folder / SPLITS).is_file()


def read_saved(folder: Path, name: str | None, split: str) -> list[dict[str, Any]]:
    """The rows of one split of a folder that ``save_to_disk`` has written.

    Raises:
        InputError: there is no such split, or the folder is damaged.
    """
    import datasets

    if name:
        raise InputError(
            f"{folder} was written by save_to_disk and has no configuration {name!r}. Leave name "
            "out of hf_args."
        )
    try:
        if (folder / SPLITS).is_file():
            splits = [str(x) for x in json.loads((folder / SPLITS).read_text("utf-8"))["splits"]]
            if split not in splits:
                raise InputError(
                    f"{folder} has the splits {', '.join(splits)}, and not {split!r}. Give one of "
                    f"its folders, e.g. {folder / splits[0]}."
                )
            folder = folder / split
        elif split != "train":
            raise InputError(f"{folder} is one split, and not {split!r}. Set split=train.")
        state = json.loads((folder / STATE).read_text("utf-8"))
        for file in state["_data_files"]:
            if Path(file["filename"]).name != file["filename"]:
                raise InputError(f"{folder / STATE} names a file outside: {file['filename']!r}.")
        rows: list[dict[str, Any]] = datasets.Dataset.load_from_disk(str(folder)).to_list()
    except InputError:
        raise
    except Exception as error:  # a damaged folder fails in ways of its own
        why = " ".join(str(error).split())[:200].rstrip(".")
        raise InputError(
            f"{folder} is not a whole data set of save_to_disk ({why}). Write or copy it again."
        ) from error
    if not rows:
        raise InputError(f"{folder} holds no rows. Give a data set with at least one.")
    return rows


def find_files(folder: Path, name: str | None, split: str) -> tuple[list[Path], list[str]]:
    """The files of one split, in their order, and what their names could have been.

    ``<name>.json`` (or .jsonl, .parquet, ...) for its split ``train``, ``<name>/<split>.json``, and
    without a name ``<split>.json`` or ``data/<split>.json``; each also in shards, as
    ``<split>-00000-of-00002.parquet``.

    Raises:
        InputError: a shard is missing.
    """
    stems = [f"{name}/{split}"] if name else [split, f"data/{split}"]
    if name and split == "train":
        stems.insert(0, name)
    for stem in stems:
        for suffix in SUFFIXES:
            if (file := folder / f"{stem}{suffix}").is_file():
                return [file], stems
        if shards := _shards(folder / stem):
            return shards, stems
    return [], stems


def _shards(stem: Path) -> list[Path]:
    """The parts of a file that the hub has divided, in their order."""
    parts = {
        file: match
        for file in sorted(stem.parent.glob(f"{escape(stem.name)}-*-of-*"))
        if file.suffix in SUFFIXES and (match := SHARD.fullmatch(file.stem))
    }
    totals = {int(match[2]) for match in parts.values()}
    numbers = [int(match[1]) for match in parts.values()]
    if parts and (len(totals) > 1 or numbers != list(range(max(totals)))):
        there = ", ".join(file.name for file in parts)
        raise InputError(
            f"{stem.parent}: the parts of {stem.name!r} are not whole: {there}. Copy all of one "
            "version, and no others."
        )
    return list(parts)
