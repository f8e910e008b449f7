"""Read the hashes of what a run was trained on, or make them from its data where it has none."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unlora.data.row_texts import RowText, row_texts
from unlora.data.rows import ReadRows
from unlora.errors import InputError
from unlora.recipes.run_history import data_sets
from unlora.runs.row_hashes import (
    FILE,
    Match,
    RowHashes,
    key_file,
    key_id,
    read_key,
    read_row_hashes,
)
from unlora.runs.safe_loading import read_json

PARTS = ("train", "forget", "retain", "alternate")
TRAINED = {"train": "retain"}  # the name under which a run's manifest counts a part's rows


@dataclass
class Wanted:
    """Rows that are looked for, hashed once under each key."""

    texts: Sequence[Sequence[RowText]]
    known: dict[bytes, RowHashes] = field(default_factory=dict)

    def hashes(self, key: bytes) -> RowHashes:
        """Of all texts of all rows, one after another."""
        if key not in self.known:
            self.known[key] = RowHashes.of([text for row in self.texts for text in row], key)
        return self.known[key]

    def find(self, trained: RowHashes, key: bytes) -> list[Match | None]:
        """How each row is among trained ones: in whole, or at least half of its texts nearly."""
        each = iter(trained.find(self.hashes(key)))
        matches: list[Match | None] = []
        for row in self.texts:
            of_row = [next(each) for _ in row]
            half = 2 * sum(match is not None for match in of_row) >= len(of_row)
            exact = all(match == "exact" for match in of_row)
            matches.append("exact" if exact else "near" if half else None)
        return matches


def trained_rows(
    folder: Path, config: Mapping[str, Any], load: ReadRows
) -> tuple[bytes, dict[str, RowHashes]]:
    """The hashes of what a run was trained on, by part, and their key.

    Args:
        load: reads the data of runs that name no folder of data sets.

    Raises:
        InputError: they are not there, and neither are the data.
    """
    why = "it has no row hashes"
    if (folder / FILE).is_file():
        manifest = folder / "manifest.json"
        known = read_json(manifest).get("row_hashes") if manifest.is_file() else None
        try:
            made_with, parts = read_row_hashes(folder, (known or {}).get("sha256"))
            files = dict.fromkeys([key_file(folder), key_file(Path("saves", "run"))])
            for key in filter(None, map(read_key, files)):
                if key_id(key) == made_with:
                    return key, parts
            why = f"its row hashes were made with another key than {' or '.join(map(str, files))}"
        except InputError as error:
            why = str(error).rstrip(".")
    key = secrets.token_bytes(32)
    try:
        texts = texts_of_data(folder, config, load)
    except (InputError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{why}, and its data cannot be read: {error}") from error
    return key, {part: RowHashes.of(rows, key) for part, rows in texts.items()}


def texts_of_data(
    folder: Path, config: Mapping[str, Any], load: ReadRows
) -> dict[str, list[RowText]]:
    """The texts of the data sets that a run's config names, by part.

    Raises:
        InputError: they cannot be read, or have another number of rows than the run's manifest.
    """
    datasets_dir = (config.get("paths") or {}).get("datasets_dir")
    if datasets_dir not in (None, load.datasets_dir):
        load = ReadRows(datasets_dir)
    manifest = folder / "manifest.json"
    counts = read_json(manifest).get("data") or {} if manifest.is_file() else {}
    parts = {}
    for part in PARTS:
        texts, is_text = [], False
        for declared in data_sets(config.get("data") or {}, part):
            args = declared["args"]
            hub = {key: value for key, value in args["hf_args"].items() if value != "(hidden)"}
            keys = [args.get(f"{x}_key", x) for x in ("question", "answer", "text")]
            is_text = declared["handler"] == "PretrainingDataset"
            rows = load(**hub)
            if is_text:
                rows = [{keys[2]: row.get(keys[2])} for row in rows]
            texts += [text for row in row_texts(rows, *keys) for text in row]
        count = (counts.get(part) or counts.get(TRAINED.get(part)) or {}).get("rows")
        if texts and not is_text and count not in (None, len(texts)):
            raise InputError(
                f"its {part} data have {len(texts)} rows now, and had {count} when it was trained"
            )
        if texts:
            parts[part] = texts
    if not parts:
        raise InputError("its config names no data")
    return parts
