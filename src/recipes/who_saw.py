"""Find the runs that were trained on given rows, by the hashes that runs keep of theirs.

A run of before, without hashes, is read from its data where they are still there.
"""

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unlora.data.row_texts import row_texts
from unlora.data.rows import ReadRows
from unlora.errors import InputError
from unlora.model.lineage import looks_local
from unlora.recipes.run_history import RUN_CONFIG, History, run_config
from unlora.recipes.trained_rows import Wanted, trained_rows
from unlora.runs.atomic_files import files_below
from unlora.runs.row_hashes import Match, RowHashes, key_file, make_key

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Sighting:
    """One row in the data of one run.

    Attributes:
        run: the model that was asked about.
        link: the run that trained on the row: that one, or one it was made from.
        part: of the link's data: ``train``, ``forget``, ``retain``, ``alternate``.
    """

    run: Path
    link: Path
    part: str
    match: Match


@dataclass(frozen=True)
class Unknown:
    """A run of which nobody can tell what it was trained on, and why."""

    run: Path
    link: Path
    why: str


@dataclass(frozen=True)
class WhoSaw:
    """What was trained on some rows.

    Attributes:
        rows: of each row, where it was seen; nothing where no run saw it.
        unknown: where that cannot be told.
        runs: all that was looked at.
        roots: the models that they started from, of which nothing is known.
    """

    rows: tuple[tuple[Sighting, ...], ...]
    unknown: tuple[Unknown, ...]
    runs: tuple[Path, ...]
    roots: tuple[str, ...]

    def links(self, *parts: str) -> list[Path]:
        """The runs that trained on one of the rows, in these parts of their data, or in any."""
        sightings = (sighting for row in self.rows for sighting in row)
        return [*dict.fromkeys(x.link for x in sightings if not parts or x.part in parts)]


def who_saw(
    rows: Rows,
    folders: Sequence[str | Path],
    *,
    question_key: str = "question",
    answer_key: str = "answer",
    text_key: str = "text",
) -> WhoSaw:
    """Look rows up in what runs, and the runs they were made from, were trained on.

    Args:
        rows: questions and answers, conversations, or running texts.
        folders: runs, or folders with runs somewhere below.

    Raises:
        InputError: a folder holds no run, or the rows have none of the columns.
    """
    wanted = Wanted(row_texts(rows, question_key, answer_key, text_key))
    runs = list(dict.fromkeys(run for folder in folders for run in _runs_in(Path(folder))))
    search = _Search(wanted, [[] for _ in rows])
    for run in runs:
        search.look_into(run)
    return WhoSaw(
        tuple(map(tuple, search.sightings)),
        tuple(search.unknown),
        tuple(runs),
        tuple(dict.fromkeys(search.roots)),
    )


def find_rows(
    wanted: Rows,
    rows: Rows,
    *,
    question_key: str = "question",
    answer_key: str = "answer",
    text_key: str = "text",
) -> list[Match | None]:
    """How each of ``rows`` is among the wanted ones.

    Raises:
        InputError: rows have none of the columns.
    """
    texts = [row_texts(some, question_key, answer_key, text_key) for some in (wanted, rows)]
    key = secrets.token_bytes(32)
    return Wanted(texts[1]).find(RowHashes.of([text for row in texts[0] for text in row], key), key)


def row_hashes(
    rows: Rows,
    folder: str | Path,
    *,
    question_key: str = "question",
    answer_key: str = "answer",
    text_key: str = "text",
) -> list[str]:
    """The keyed hash of each row's text; the key is that of a run in this folder.

    Raises:
        InputError: rows have none of the columns, or the key cannot be read or made.
    """
    texts = row_texts(rows, question_key, answer_key, text_key)
    joined = [tuple("\n".join(x) for x in zip(*row, strict=True)) for row in texts]
    hashes = RowHashes.of([(q, a) for q, a in joined], make_key(key_file(folder))).exact
    return [f"{number:016x}" for number in hashes]


@dataclass
class _Search:
    """What was found until now; a run that several were made from is looked into once."""

    wanted: Wanted
    sightings: list[list[Sighting]]
    unknown: list[Unknown] = field(default_factory=list)
    roots: list[str] = field(default_factory=list)
    load: ReadRows = field(default_factory=lambda: ReadRows(None))
    matches: dict[Path, dict[str, list[Match | None]] | str] = field(default_factory=dict)

    def look_into(self, run: Path) -> None:
        """Look the rows up in a run and in all that it was made from."""
        try:
            history = History.of(str(run))
        except InputError as error:
            self.unknown.append(Unknown(run, run, str(error)))
            return
        self.roots.append(history.origin)
        for link, config in history.runs:
            matches = self._matches_of(link, config)
            if isinstance(matches, str):
                self.unknown.append(Unknown(run, link, matches))
                continue
            for part, of_rows in matches.items():
                for number, match in enumerate(of_rows):
                    if match:
                        self.sightings[number].append(Sighting(run, link, part, match))
        if looks_local(history.origin) and not os.path.isdir(history.origin):
            self.unknown.append(Unknown(run, Path(history.origin), "its folder is not there"))

    def _matches_of(
        self, link: Path, config: Mapping[str, Any]
    ) -> dict[str, list[Match | None]] | str:
        """How each row is in each part of a run's data, or why that is unknown."""
        folder = link.resolve()
        if folder not in self.matches:
            try:
                key, parts = trained_rows(link, config, self.load)
                self.matches[folder] = {
                    part: self.wanted.find(rows, key) for part, rows in parts.items()
                }
            except InputError as error:
                self.matches[folder] = str(error)
        return self.matches[folder]


def _runs_in(folder: Path) -> list[Path]:
    """A run, or every run below a folder.

    Raises:
        InputError: there is none.
    """
    if run_config(folder):
        return [folder]
    files = files_below(folder, RUN_CONFIG) if folder.is_dir() else []
    if not (runs := [file.parent for file in files if run_config(file.parent)]):
        raise InputError(
            f"There is no run in {str(folder)!r}. Give run folders, or a folder that they are in."
        )
    return runs
