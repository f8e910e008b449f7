"""Write the entries of an evidence folder, which are chained by SHA-256.

``evidence.json`` has a list of entries. Each holds its ``kind``, its ``content``, the ``sha256`` of
all that, and as ``previous`` the ``sha256`` of the entry before. The last entry names every other
file of the folder with its hash, so whoever knows its ``sha256`` can tell whether anything of the
folder is another than it was.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unlora.deletion.page import as_html
from unlora.runs.atomic_files import sync_files, write_text
from unlora.runs.hashes import sha256
from unlora.runs.safe_loading import read_json

FILE, PAGE, REQUEST, ROWS = "evidence.json", "evidence.html", "request.json", "rows.jsonl"
FIGURES = ("held", "attacks", "retain_probability", "recognisable")


def entry(kind: str, content: Any, previous: str | None) -> dict[str, Any]:
    """An entry with its hash."""
    body = {"kind": kind, "content": content, "previous": previous}
    return {**body, "sha256": hash_of(body)}


def hash_of(body: Mapping[str, Any]) -> str:
    """sha256 of an entry without its own."""
    text = json.dumps(body, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def as_text(entries: Sequence[Mapping[str, Any]]) -> str:
    """What ``evidence.json`` holds, to the byte."""
    return json.dumps({"entries": list(entries)}, indent=2, ensure_ascii=False) + "\n"


def append(folder: Path, kind: str, content: Any) -> None:
    """Add an entry, write the page anew, and name all files again."""
    entries = read_json(folder / FILE)["entries"]
    write_entries(folder, [*entries, entry(kind, content, entries[-1]["sha256"])])


def write_entries(folder: Path, entries: list[dict[str, Any]]) -> Path:
    """Write the page, and ``evidence.json`` after all that its last entry names."""
    facts = {item["kind"]: item["content"] for item in entries}
    write_text(folder / PAGE, as_html(facts))
    files = {
        file.name: sha256(file)
        for file in sorted(folder.iterdir())
        if file.name != FILE and file.is_file()
    }
    entries = [*entries, entry("files", files, entries[-1]["sha256"])]
    sync_files(folder)
    write_text(folder / FILE, as_text(entries))
    return folder / FILE
