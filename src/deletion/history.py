"""Look up which runs of a model's lineage were trained on the rows of a request."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from unlora.config.resolve import section_as_written
from unlora.data import fingerprint, load_parts
from unlora.data.chat_encoding import Chat
from unlora.deletion.request_rows import DataSet, Rows, data_sets, matches_in
from unlora.errors import InputError
from unlora.recipes.run_history import History
from unlora.recipes.who_saw import who_saw
from unlora.runs.safe_loading import read_json

PARTS = ("train", "forget", "retain", "alternate")
LEARNT = ("train", "retain", "alternate")  # what a run teaches
MANIFEST = "manifest.json"
Numbers = Mapping[tuple[str, str], Sequence[int]]  # part and name of a data set -> its rows


@dataclass(frozen=True)
class PastRun:
    """A training that a model comes from.

    Attributes:
        config, manifest: as the folder has them.
    """

    folder: Path
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]

    @cached_property
    def sets(self) -> list[DataSet]:
        """All its data sets."""
        return list(data_sets(self.config, *PARTS))

    @cached_property
    def is_scaled(self) -> bool:
        """Whether it was not trained but dialled."""
        return "scaled" in self.manifest

    @property
    def num_rows(self) -> int:
        """Rows of one epoch, of all parts that it was trained on."""
        return sum(part["rows"] for part in self.manifest.get("data", {}).values())

    @property
    def seconds(self) -> float | None:
        """What the training took, without the evaluation after it."""
        evaluated = self.config.get("evaluate", True) and self.config.get("eval")
        history = self.manifest.get("training") or []
        runtimes = [log["train_runtime"] for log in history if "train_runtime" in log]
        resumed = self.manifest.get("resumed")
        seconds = runtimes[-1] if evaluated and runtimes and not resumed else None
        return seconds or self.manifest.get("seconds")

    @property
    def seconds_per_row(self) -> float | None:
        """Seconds of training for one pass of one row, forward and backward."""
        steps, batch = (self.manifest.get(key) for key in ("optimiser_steps", "effective_batch"))
        parts = len([part for part in self.manifest.get("data", {}) if part != "alternate"])
        if not (steps and batch and parts and self.seconds):
            return None
        return float(self.seconds) / (steps * batch * parts)

    @property
    def memory(self) -> Mapping[str, int]:
        """Device -> bytes at the peak."""
        peaks: Mapping[str, int] = self.manifest.get("peak_memory_bytes") or {}
        return peaks

    def refuse_changed_data(self) -> None:
        """Raise InputError where its data are not those that it was trained on."""
        from unlora.model import load_tokenizer, resolve_model

        known = self.manifest.get("data") or {}
        model = resolve_model(section_as_written(self.config["model"]))
        chat = Chat(load_tokenizer(model), model.section.template_args)
        folder = (self.config.get("paths") or {}).get("datasets_dir")
        seed = self.manifest.get("seed") or 0
        parts = load_parts(
            self.config["data"], chat, tuple(known), seed=seed, datasets_dir=folder,
            score_forget_end=self.config["trainer"].get("score_forget_end", True),
        )  # fmt: skip
        for part, rows in parts.rows.items():
            if fingerprint(rows) != known[part]:
                raise InputError(
                    f"The data of {str(self.folder)!r} are not those that it was trained on: its "
                    f"part {part} had {known[part]['rows']} rows of other content. Put the old "
                    "data back, or give --route approximate."
                )


@dataclass(frozen=True)
class SeenBy:
    """The rows of a request that a run was trained on.

    Attributes:
        exact, near: numbers of the rows in each of its data sets.
        unreadable: why its data cannot be read, where that is so.
        hashed: part -> how many of the rows are in it by the hashes that the run kept, where its
            data cannot be read.
    """

    run: PastRun
    exact: Numbers
    near: Numbers
    unreadable: str | None = None
    hashed: Mapping[str, int] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, int]:
        """Part of its data -> how many of its rows are among those requested."""
        counts = Counter(self.hashed)
        for (part, _), rows in self.exact.items():
            counts[part] += len(rows)
        return dict(counts)

    @property
    def learnt(self) -> int:
        """How many rows it was trained to answer."""
        return sum(count for part, count in self.parts.items() if part in LEARNT)

    @property
    def count(self) -> int:
        """How many rows are in its data, also as ones to be forgotten."""
        return sum(self.parts.values())


def past_runs(model: str) -> list[PastRun]:
    """The trainings that a model comes from, the first one first.

    Raises:
        InputError: there is no such model, a link of its lineage is broken, or a run is unfinished.
    """
    if not Path(model).is_dir():
        raise InputError(f"There is no run folder {model!r}. Give one: --model saves/finetune/NAME")
    runs = []
    for folder, config in reversed(History.of(model).runs):
        if not (folder / MANIFEST).is_file():
            raise InputError(
                f"{str(folder)!r} has no {MANIFEST}: its training goes on, or was stopped. Wait "
                "for it, or let it go on with trainer.args.resume_from_checkpoint=auto."
            )
        runs.append(PastRun(folder, config, read_json(folder / MANIFEST)))
    if not runs:
        raise InputError(
            f"{model!r} is no run folder of this program, so nothing tells what it was trained on. "
            "Give one: --model saves/finetune/NAME"
        )
    return runs


def seen_by(run: PastRun, request: DataSet, rows: Rows) -> SeenBy:
    """Find the rows of a request in the data of a run."""
    exact: dict[tuple[str, str], list[int]] = {}
    near: dict[tuple[str, str], list[int]] = {}
    try:
        for data_set in run.sets:
            matches = matches_in(data_set, request, rows)
            for kind, numbers in (("exact", exact), ("near", near)):
                if matches[kind]:
                    numbers[data_set.part, data_set.name] = matches[kind]
    except InputError as error:
        return SeenBy(run, {}, {}, str(error), _hashed(run, request, rows))
    return SeenBy(run, exact, near)


def _hashed(run: PastRun, request: DataSet, rows: Rows) -> dict[str, int]:
    """Count the rows in the hashes that a run kept of its data."""
    counts: Counter[str] = Counter()
    for sightings in who_saw(rows, [run.folder], **request.columns).rows:
        counts.update({
            sighting.part
            for sighting in sightings
            if sighting.match == "exact" and sighting.link.resolve() == run.folder.resolve()
        })  # fmt: skip
    return dict(counts)


def peak_memory(runs: Iterable[PastRun]) -> int | None:
    """Bytes at the highest peak of some runs, of a GPU where they had one."""
    peaks = [
        max(
            (size for key, size in run.memory.items() if key != "cpu"),
            default=run.memory.get("cpu"),
        )
        for run in runs
    ]
    return max((peak for peak in peaks if peak), default=None)
