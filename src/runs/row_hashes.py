"""Hash the rows that a run trains on, and look rows up in the hashes.

A run folder has ``row_hashes.npz``: for each part of its data four arrays with a line for each row.

* ``exact``: 8 bytes of keyed BLAKE2b of question and answer;
* ``letters``: the same of their letters and digits alone, in lower case;
* ``question``: the same of the question's, 0 where there is none;
* ``sketch``: MinHash (Broder 1997) of the words, 128 hashes of which a byte each is kept (Li and
  König 2010, arXiv:0910.3349).

A row is 152 bytes. Without the key nobody can try texts out on them: ``.row_hash_key``, 32 random
bytes that only the user can read, in the folder ``saves`` that the run is in.
"""

import hashlib
import io
import logging
import os
import re
import secrets
import unicodedata
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from unlora.errors import InputError
from unlora.runs.atomic_files import is_main_process, write_bytes

FILE, KEY_FILE = "row_hashes.npz", ".row_hash_key"
KEY_BYTES, HASHES, BAND = 32, 128, 4
SIMILAR = 0.8  # share of equal hashes, an estimate of the Jaccard index of two sets of words
AT_ONCE = 1 << 16  # pairs of rows that are compared at once
WORD = re.compile(r"[^\W⺀-鿿豈-﫿]+|[⺀-鿿豈-﫿]")  # of Chinese and Japanese, every character
LETTERS = re.compile(r"\d+|[^\W\d_]+")
logger = logging.getLogger(__name__)
RowText = tuple[str, str]  # question and answer; of running text, "" and the text
Match = Literal["exact", "near"]


@dataclass(frozen=True)
class RowHashes:
    """Hashes of some rows under one key; every array has a line for each row."""

    exact: NDArray[np.uint64]
    letters: NDArray[np.uint64]
    question: NDArray[np.uint64]
    sketch: NDArray[np.uint8]

    @classmethod
    def of(cls, rows: Sequence[RowText], key: bytes) -> "RowHashes":
        """Hash rows."""
        exact = (f"{question.strip()}\x1f{answer.strip()}" for question, answer in rows)
        return cls(
            _hashes(exact, key, b"exact"),
            _hashes((_letters(f"{question} {answer}") for question, answer in rows), key, b"row"),
            _hashes((question and _letters(question) for question, _ in rows), key, b"question"),
            _sketches([f"{question} {answer}" for question, answer in rows], key),
        )

    def __len__(self) -> int:
        return len(self.exact)

    def joined(self, other: "RowHashes") -> "RowHashes":
        """These rows, and those of others that are not among them."""
        new = ~np.isin(other.exact, self.exact)
        pairs = ((getattr(self, x.name), getattr(other, x.name)[new]) for x in fields(self))
        return RowHashes(*map(np.concatenate, pairs))

    def find(self, wanted: "RowHashes") -> list[Match | None]:
        """How each wanted row is among these."""
        exact, near = np.isin(wanted.exact, self.exact), np.isin(wanted.letters, self.letters)
        rest = np.flatnonzero(~near)
        near[rest[self._similar(wanted.sketch[rest])]] = True
        return ["exact" if e else "near" if n else None for e, n in zip(exact, near, strict=True)]

    def _similar(self, wanted: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Which of the sketches are like one of these.

        Compared are rows of which a band of hashes is equal (locality-sensitive hashing).
        """
        similar = np.zeros(len(wanted), bool)
        mine = self.sketch[np.unique(self.letters, return_index=True)[1]]
        for start in range(0, HASHES, BAND):
            rest = np.flatnonzero(~similar)
            theirs = _band(wanted[rest], start)
            own = _band(mine, start)
            order = np.argsort(own)
            first = np.searchsorted(own, theirs, "left", order)
            count = np.searchsorted(own, theirs, "right", order) - first
            pair = np.repeat(np.arange(len(rest)), count)
            at = np.arange(len(pair)) - np.repeat(np.cumsum(count) - count, count) + first[pair]
            for some in range(0, len(pair), AT_ONCE):
                numbers = rest[pair[some : some + AT_ONCE]]
                equal = wanted[numbers] == mine[order[at[some : some + AT_ONCE]]]
                similar[numbers[equal.mean(1) >= SIMILAR]] = True
        return similar


def write_row_hashes(
    folder: Path, texts: Mapping[str, Sequence[RowText]], *, resumed: bool = False
) -> dict[str, Any] | None:
    """Write the hashes of what a run trains on, each part's under its name.

    Args:
        resumed: rows of before stay: the run has been trained on them, too.

    Returns:
        What the manifest says of them; None where another process writes them, or the folder of the
        key cannot be written.
    """
    if not is_main_process():
        return None
    try:
        key = make_key(key_file(folder))
    except InputError as error:
        logger.warning("No hashes of the rows are kept: %s", error)
        return None
    parts = {part: RowHashes.of(rows, key) for part, rows in texts.items()}
    if resumed and (folder / FILE).is_file():
        made_with, before = read_row_hashes(folder)
        if made_with == key_id(key):
            parts = before | {
                p: before[p].joined(x) if p in before else x for p, x in parts.items()
            }
    arrays = {
        f"{part}.{field.name}": getattr(rows, field.name)
        for part, rows in parts.items()
        for field in fields(rows)
    }
    content = io.BytesIO()
    np.savez(content, key=np.array(key_id(key)), **arrays)
    write_bytes(folder / FILE, content.getvalue())
    sha256 = hashlib.sha256(content.getvalue()).hexdigest()
    return {"sha256": sha256, "rows": {part: len(rows) for part, rows in parts.items()}}


def read_row_hashes(folder: Path, sha256: str | None = None) -> tuple[str, dict[str, RowHashes]]:
    """The hashes of a run: the id of their key, and those of each part.

    Args:
        sha256: as the manifest has it.

    Raises:
        InputError: they cannot be read, or are not those that the manifest names.
    """
    file = folder / FILE
    try:
        content = file.read_bytes()
        if sha256 not in (None, hashlib.sha256(content).hexdigest()):
            raise InputError(f"{str(file)!r} is not the file that its manifest names.")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            parts = dict.fromkeys(name.partition(".")[0] for name in arrays if "." in name)
            rows = {
                part: RowHashes(*(arrays[f"{part}.{field.name}"] for field in fields(RowHashes)))
                for part in parts
            }
            return str(arrays["key"]), rows
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{str(file)!r} cannot be read: {error}.") from error


def key_file(run: str | Path) -> Path:
    """Where the key of a run folder is: in the folder ``saves`` above it, else beside it."""
    folder = Path(os.path.realpath(run))
    saves = (parent for parent in folder.parents if parent.name == "saves")
    return next(saves, folder.parent) / KEY_FILE


def read_key(file: Path) -> bytes | None:
    """The key in a file, None where there is none.

    Raises:
        InputError: it cannot be read, or is no key.
    """
    try:
        key = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(
            f"The key of row hashes {str(file)!r} cannot be read: {error.strerror}. Allow yourself "
            "to read it, or move it away: runs of before are then known by their data alone."
        ) from error
    if len(key) != KEY_BYTES:
        raise InputError(
            f"The key of row hashes {str(file)!r} has {len(key)} bytes instead of {KEY_BYTES}. Put "
            "the old file back, or move it away: runs of before are then known by their data alone."
        )
    return key


def make_key(file: Path) -> bytes:
    """The key in a file, which is made where there is none; only its user can read it.

    Raises:
        InputError: it cannot be read or written.
    """
    if key := read_key(file):
        return key
    new = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        number = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(number, "wb") as stream:
            stream.write(secrets.token_bytes(KEY_BYTES))
        with suppress(FileExistsError):  # of several processes, the first made it
            os.link(new, file)
    except OSError as error:
        raise InputError(
            f"The key of row hashes {str(file)!r} cannot be written: {error.strerror}."
        ) from error
    finally:
        new.unlink(missing_ok=True)
    return read_key(file) or make_key(file)


def key_id(key: bytes) -> str:
    """Name a key without telling it."""
    return hashlib.blake2b(b"", key=key, digest_size=8, person=b"key id").hexdigest()


def _hashes(texts: Any, key: bytes, of: bytes) -> NDArray[np.uint64]:
    new: Callable[..., Any] = hashlib.blake2b
    digests = (
        new(text.encode("utf-8", "surrogatepass"), key=key, digest_size=8, person=of).digest()
        if text
        else bytes(8)
        for text in texts
    )
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def _letters(text: str) -> str:
    """A text without case, spaces and punctuation."""
    runs = LETTERS.findall(unicodedata.normalize("NFKC", text).casefold())
    # the border of a number stays: 1 + 2 is not 12
    return "".join(f"{x} " if x.isdigit() else x for x in runs) or " ".join(text.split())


def _sketches(texts: Sequence[str], key: bytes) -> NDArray[np.uint8]:
    """MinHash of the words of each text, [texts, hashes]."""
    if not texts:
        return np.zeros((0, HASHES), np.uint8)
    known: dict[str, int] = {}
    folded = (unicodedata.normalize("NFKC", text).casefold() for text in texts)
    rows = [[known.setdefault(word, len(known)) for word in WORD.findall(t) or [t]] for t in folded]
    words = _hashes((f"{word}\x1f" for word in known), key, b"word")[
        [n for row in rows for n in row]
    ]
    starts = np.cumsum([0, *map(len, rows[:-1])])
    draws = _hashes(map(str, range(2 * HASHES)), key, b"draw").reshape(HASHES, 2)
    sketch = np.empty((len(texts), HASHES), np.uint8)
    for number, (factor, added) in enumerate(draws):
        mixed = words * (factor | np.uint64(1)) + added
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        sketch[:, number] = np.minimum.reduceat(mixed >> np.uint64(32), starts) & np.uint64(255)
    return sketch


def _band(sketch: NDArray[np.uint8], start: int) -> NDArray[np.uint32]:
    band = np.ascontiguousarray(sketch[:, start : start + BAND])
    return band.view(np.uint32).reshape(len(band))
