"""Find the retain model: of the same origin, never trained on the forget data.

Content decides, not names: every row that a run and the runs below it were trained on is compared
with the forget rows of the evaluation.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unlora.config.schema import Config
from unlora.data.conversations import as_questions
from unlora.data.row_texts import RowText, pair_texts, text_pieces
from unlora.data.rows import ReadRows
from unlora.errors import InputError
from unlora.model.lineage import Lineage
from unlora.recipes.run_history import RUN_CONFIG, History, data_sets, same, same_origin
from unlora.recipes.trained_rows import Wanted, trained_rows
from unlora.runs.atomic_files import files_below
from unlora.runs.row_hashes import RowHashes


@dataclass(frozen=True)
class Unseen:
    """The forget rows of an evaluation.

    Attributes:
        questions: every question, whatever its answer.
        texts: of every running text, its sentences.
    """

    questions: tuple[RowText, ...]
    texts: tuple[tuple[RowText, ...], ...]

    @classmethod
    def of(cls, data: Mapping[str, Mapping[str, Any]], load: ReadRows) -> "Unseen":
        """The rows of the data sets of a suite that are called forget, or begin so."""
        questions: list[RowText] = []
        texts: list[tuple[RowText, ...]] = []
        for name, declared in data.items():
            if name.split("_")[0] != "forget":
                continue
            rows = load(**declared["hf_args"])
            if declared["handler"] == "QADataset":
                key = declared["question_key"]
                for row in as_questions(rows, key, declared["answer_key"]):
                    columns = {"question", key} & row.keys()
                    questions += pair_texts((row[column], "") for column in columns)
            else:
                key = declared["text_key"]
                texts += [tuple(text_pieces(str(row[key]))) for row in rows if key in row]
        return cls(tuple(questions), tuple(texts))

    def among(self, trained: RowHashes, key: bytes) -> bool | None:
        """Whether one of them is among the rows of a run; None where that cannot be told."""
        theirs = trained.question[trained.question != 0]
        if not len(trained) or (len(theirs) and not self.questions):
            return None
        if len(theirs) < len(trained) and not self.texts:
            return None
        wanted = RowHashes.of(self.questions, key).question if len(theirs) else theirs
        return bool(np.isin(wanted, theirs).any()) or any(Wanted(self.texts).find(trained, key))


def find_gold(
    config: Config,
    suite: Mapping[str, Any],
    history: History,
    has_log: Callable[[Path], bool],
) -> Path | None:
    """The run under ``saves/finetune`` that stands for never having seen the forget rows.

    It started from the same origin, was trained on the same data set, and neither it nor a run
    below it was trained on a forget row. Of several, one that was trained in the same way (an
    adapter, or all weights) comes first, then the one with the most rows (for forget01, retain99
    before retain90), then one with a log of the suite, then the newest.

    Raises:
        InputError: the forget rows of the suite cannot be read.
    """
    load = ReadRows(config.paths.datasets_dir)
    unseen = Unseen.of(suite["data"], load)
    known = [config.data, *(run.get("data") or {} for _, run in history.runs)]
    paths = (data["hf_args"]["path"] for data in suite["data"].values())
    places = {_place(path) for path in paths if path}
    places |= {_place(path) for data in known for path in _paths(data, "train", "forget", "retain")}
    used = [folder for folder, _ in history.runs] + [Path(config.paths.output_dir)]
    candidates = []
    for file in files_below(Path(config.paths.root_dir) / "saves" / "finetune", RUN_CONFIG):
        folder = file.parent
        if ".previous-" in folder.name or any(same(folder, other) for other in used):
            continue
        try:
            other = History.of(str(folder))
            if not other.runs or not same_origin(history.origin, other.origin):
                continue
            trained_on = {_place(path) for path in _paths(other.runs[0][1]["data"], "train")}
            if not trained_on or not trained_on <= places:
                continue
            trained = [trained_rows(*run, load) for run in other.runs]
            seen = [unseen.among(parts["train"], key) for key, parts in trained]
        except (InputError, KeyError, TypeError, OSError):
            continue  # its data or its start are gone: nobody knows what it saw
        if all(each is False for each in seen):
            alike = history.uses_lora in (None, other.uses_lora)
            total = sum(len(parts["train"]) for _, parts in trained)
            candidates.append((alike, total, has_log(folder), file.stat().st_mtime, folder))
    return next(
        (candidate[-1] for candidate in sorted(candidates, reverse=True) if _loads(candidate[-1])),
        None,
    )


def _paths(data: Mapping[str, Any], *parts: str) -> list[str]:
    return [str(declared["args"]["hf_args"]["path"]) for declared in data_sets(data, *parts)]


def _place(path: str) -> str:
    return str(Path(path).resolve()) if os.path.exists(path) else path.lower()


def _loads(folder: Path) -> bool:
    """Whether a run folder holds a model with all that it stands on."""
    try:
        lineage = Lineage.read(str(folder))
    except InputError:
        return False
    return bool(lineage.links) or any(folder.glob("*.safetensors"))
