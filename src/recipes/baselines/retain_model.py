"""Find the retain model: of the same origin, never trained on the forget data.

Content decides, not names: every row that a run and the runs below it were trained on is compared
with the forget rows of the evaluation.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlora.config.schema import Config
from unlora.errors import InputError
from unlora.evals.datasets import ReadRows
from unlora.model.lineage import FILE, Lineage, fingerprint, looks_local
from unlora.runs.run import files_below
from unlora.runs.safe_loading import near, read_json

RUN_CONFIG = "run_config.json"
PROBE = 120  # letters of a running text by which it is known again


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


@dataclass(frozen=True)
class Unseen:
    """The forget rows of an evaluation.

    Attributes:
        questions: every question, as :func:`plain` has it.
        probes: of every running text, pieces that are in it.
    """

    questions: frozenset[str]
    probes: frozenset[str]

    @classmethod
    def of(cls, data: Mapping[str, Mapping[str, Any]], load: ReadRows) -> "Unseen":
        """The rows of the data sets of a suite that are called forget, or begin so."""
        questions: set[str] = set()
        probes: set[str] = set()
        for name, declared in data.items():
            if name.split("_")[0] == "forget":
                for row in load(**declared["hf_args"]):
                    if declared["handler"] == "QADataset":
                        keys = {"question", declared["question_key"]}
                        questions |= {plain(row[key]) for key in keys if key in row}
                    elif declared["text_key"] in row:
                        probes |= set(_pieces(plain(row[declared["text_key"]])))
        return cls(frozenset(questions), frozenset(probes))

    def can_tell(self, config: Mapping[str, Any]) -> bool:
        """Whether there is something by which forget rows would be known in what a run read."""
        read = data_sets(config.get("data") or {}, "train")
        kinds = {declared["handler"] == "PretrainingDataset" for declared in read}
        return bool(kinds) and all(self.probes if text else self.questions for text in kinds)

    def by(self, config: Mapping[str, Any], load: ReadRows) -> int | None:
        """How many rows a run was trained on; None if one is among these, or it cannot be told."""
        count = 0
        for declared in data_sets(config.get("data") or {}, "train"):
            args = declared["args"]
            hub = {key: value for key, value in args["hf_args"].items() if value != "(hidden)"}
            rows = load(**hub)
            count += len(rows)
            if declared["handler"] == "PretrainingDataset":
                told = " ".join(plain(row[args.get("text_key", "text")]) for row in rows)
                seen = not self.probes or any(probe in told for probe in self.probes)
            else:
                questions = {plain(row[args.get("question_key", "question")]) for row in rows}
                seen = not self.questions or not self.questions.isdisjoint(questions)
            if seen:
                return None
        return count or None


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
            rows = [unseen.by(run, _reader(run, config, load)) for _, run in other.runs]
        except (InputError, KeyError, TypeError, OSError):
            continue  # its data or its start are gone: nobody knows what it saw
        if None not in rows:
            alike = history.uses_lora in (None, other.uses_lora)
            total = sum(count or 0 for count in rows)
            candidates.append((alike, total, has_log(folder), file.stat().st_mtime, folder))
    return next(
        (candidate[-1] for candidate in sorted(candidates, reverse=True) if _loads(candidate[-1])),
        None,
    )


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


def plain(text: object) -> str:
    """A text without what differs between two copies of it: case, and breaks of lines."""
    return " ".join(str(text).lower().split())


def same(first: str | Path, other: str | Path) -> bool:
    """Whether two paths are the same folder."""
    return Path(first).resolve() == Path(other).resolve()


def _pieces(text: str) -> list[str]:
    """Begin, middle and end: a copy may be cut at any place."""
    if len(text) <= PROBE:
        return [text] if text else []
    middle = (len(text) - PROBE) // 2
    return [text[at : at + PROBE] for at in (0, middle, len(text) - PROBE)]


def _paths(data: Mapping[str, Any], *parts: str) -> list[str]:
    return [str(declared["args"]["hf_args"]["path"]) for declared in data_sets(data, *parts)]


def _place(path: str) -> str:
    return str(Path(path).resolve()) if os.path.exists(path) else path.lower()


def _reader(run: Mapping[str, Any], config: Config, load: ReadRows) -> ReadRows:
    """Reads what a run was trained on from where it was read then."""
    folder = (run.get("paths") or {}).get("datasets_dir") or config.paths.datasets_dir
    return load if folder == config.paths.datasets_dir else ReadRows(folder)


def same_origin(first: str, other: str) -> bool:
    """Whether two models that others were made from are the same, by name or by content."""
    if first == other or same(first, other):
        return True
    return (
        os.path.isdir(first) and os.path.isdir(other) and fingerprint(first) == fingerprint(other)
    )


def _loads(folder: Path) -> bool:
    """Whether a run folder holds a model with all that it stands on."""
    try:
        lineage = Lineage.read(str(folder))
    except InputError:
        return False
    return bool(lineage.links) or any(folder.glob("*.safetensors"))
