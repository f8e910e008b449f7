"""Print the plan of a study with its cost in memory and time; run none of it.

Time is measured: of stages of the same kind that were run in this study before, and else of the
first steps of one training, which are taken in a folder that is gone afterwards. Memory is
estimated from settings and tokenised rows, so it is said where there are no weights, too.
"""

import json
import math
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from unlora.config import read as checked
from unlora.config.checks import ROWS_AT_ONCE
from unlora.config.schema import Config
from unlora.errors import GuardError, InputError
from unlora.runs.hashes import digest
from unlora.studies import audit_stages, stage_fingerprints
from unlora.studies.config import Study
from unlora.studies.stage_run import Record, belongs_to, output_to
from unlora.studies.stages import Stage, variants

STEPS = 4  # that are timed
EVERY = 0.5 if sys.stderr.isatty() else 20.0  # seconds between two looks at how far it is
GB = 1e9
FINISHED = "finished"
HEADINGS: tuple[str, ...] = ("stage", "state", "rows", "steps", "trained", "memory", "time")


@dataclass(frozen=True)
class Forecast:
    """Of one stage.

    Attributes:
        state: ``finished``, ``to run``, ``goes on at step N``, ``after STAGE``.
        rows: examples of one epoch; None where they are on the hub.
        steps: optimiser steps.
        trained: parameters.
        memory: peak, bytes.
        seconds: None where nothing like it has been timed.
        note: why a figure is not known.
    """

    stage: Stage
    state: str
    rows: int | None = None
    steps: int | None = None
    trained: int | None = None
    memory: int | None = None
    seconds: float | None = None
    note: str | None = None


def as_text(study: Study, stages: Sequence[Stage], folder: Path) -> str:
    """The plan as a table, with what is left to do in its last lines.

    Raises:
        InputError: something in a config or the data is wrong.
    """
    planned = forecasts(study, stages, folder)
    rows = [HEADINGS, *map(_cells, planned)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i < 2 else c.rjust(w)
                 for i, (c, w) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
    left = [forecast for forecast in planned if forecast.state != FINISHED]
    lines += ["", f"{len(left)} of {len(planned)} stages are to be run."]
    known = [forecast.seconds for forecast in left if forecast.seconds is not None]
    if known:
        unknown = len(left) - len(known)
        lines[-1] += (
            f" About {in_time(sum(known) / study.workers)} with workers={study.workers}"
            + (f", and {unknown} stages whose time is not known yet." if unknown else ".")
        )
    lines += dict.fromkeys(forecast.note for forecast in planned if forecast.note)
    if trials := study.search["trials"]:
        lines.append(
            f"Before them: {trials} trials for each of {len(variants(study.methods))} methods "
            f"on seed {study.search['seed']}, each a training and an evaluation."
        )
    return "\n".join(lines)


def forecasts(study: Study, stages: Sequence[Stage], folder: Path) -> list[Forecast]:
    """What each stage would be."""
    finished: set[str] = set()
    times, sizes = Times(study, folder, stages), Sizes()
    rows = []
    for stage in tqdm(stages, "planning", unit=" stages", leave=False, mininterval=EVERY):
        state = _state(stage, folder, finished)
        if state == FINISHED:
            finished.add(stage.name)
            rows.append(Forecast(stage, state))
        elif stage.kind != "train":
            rows.append(Forecast(stage, state, seconds=times.of_kind(stage.kind)))
        else:
            rows.append(_training(study, stage, state, times, sizes))
    return rows


def check_evaluations(stages: Sequence[Stage]) -> None:
    """Compose every config and read its local data, which otherwise happens after other trainings.

    Raises:
        InputError: something in one is wrong.
    """
    from unlora.evals import check
    from unlora.recipes.audit import attacks_of
    from unlora.recipes.baselines import without_references

    first = {(listed.kind, listed.role, listed.overrides): listed for listed in reversed(stages)}
    configs: dict[str, Config] = {}
    for stage in reversed(first.values()):
        try:
            if stage.kind in ("audit", "dial"):
                attacks_of(audit_stages.config_of(stage))
                continue
            config = configs[stage.title] = checked(stage_fingerprints.config_of(stage))
            if stage.kind == "eval":
                check({name: without_references(suite) for name, suite in config.eval.items()})
        except InputError as error:
            raise InputError(f"{stage.title}: {error}") from error
    for title, config in sorted(configs.items(), key=lambda entry: entry[1].mode == "eval"):
        try:
            _check_columns(config)
        except InputError as error:
            raise InputError(f"{title}: {error}") from error


def _check_columns(config: Config) -> None:
    """Raise InputError where rows on this machine are no questions and answers."""
    from unlora.data.conversations import as_questions
    from unlora.data.qa import read_pairs
    from unlora.evals.own import without_column

    datasets_dir = config.paths.datasets_dir
    for where, name, data_set in _question_sets(config):
        keys = {key: data_set.get(key, key[:-4]) for key in ("question_key", "answer_key")}
        try:
            rows = stage_fingerprints.local_rows(data_set["hf_args"], datasets_dir)
            if rows is not None:
                questions = as_questions(rows, *keys.values(), of=name)
                if "needed" in data_set:  # of an evaluation, where rows may have holes
                    without_column(name, data_set, keys, questions)
                else:
                    read_pairs(questions, *keys.values())
        except InputError as error:
            raise InputError(f"Data set {name} of {where}: {error}") from error


def _question_sets(config: Config) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Of questions and answers: the part of the config, the name, and what is set."""
    for part, sets in config.data.items():
        for name, data_set in sets.items() if isinstance(sets, Mapping) else ():
            if data_set["handler"] != "PretrainingDataset":
                yield f"data.{part}", name, data_set["args"]
    for suite, section in config.eval.items():
        for name, data_set in (section.get("data") or {}).items():
            if "needed" in data_set and (data_set.get("hf_args") or {}).get("path"):
                yield f"eval.{suite}.data", name, data_set


class Sizes:
    """What trainings need; those that differ in seed and folder need the same."""

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}
        self._unreachable: dict[str, str] = {}

    def of(self, config: Config) -> Any:
        """The estimate of one.

        Raises:
            InputError: its model is out of reach, or something in it is wrong.
            GuardError: it would be silently wrong.
        """
        from unlora.trainer.memory_estimate import estimate

        model = config.model.model_args["pretrained_model_name_or_path"]
        if model in self._unreachable:  # a hub that does not answer is not asked again
            raise InputError(self._unreachable[model])
        args = {k: v for k, v in config.trainer.args.items() if k not in ("seed", "output_dir")}
        trainer = {**config.trainer.model_dump(), "args": args}
        key = digest(config.model.model_dump(), trainer, config.data)
        if key not in self._known:
            try:
                self._known[key] = estimate(config)
            except InputError as error:
                if "cannot be reached" in str(error):
                    self._unreachable[model] = str(error)
                raise
        return self._known[key]


def _training(study: Study, stage: Stage, state: str, times: "Times", sizes: Sizes) -> Forecast:
    config = checked(_from_the_start(study, stage))
    rows = _num_rows(config)
    steps = num_steps(config.trainer.args, rows) if rows else None
    size = seconds = note = None
    try:
        size = sizes.of(config)
        seconds = times.of_step(stage)
    except (InputError, GuardError) as error:
        reached = "cannot be reached" not in str(error)
        note = f"{stage.name}: {error}" if reached else str(error)
    return Forecast(stage, state, rows, steps, size and size.trained, size and size.total_bytes,
                    steps * seconds if steps and seconds else None, note)  # fmt: skip


def _from_the_start(study: Study, stage: Stage) -> dict[str, Any]:
    """The config of a training; the target's own start where its target is not there yet."""
    config = stage_fingerprints.config_of(stage)
    args = config["model"]["model_args"]
    if stage.model and not Path(stage.model).is_dir() and isinstance(study.target, list):
        start = stage_fingerprints.composed("train", study.target).model.model_args
        args["pretrained_model_name_or_path"] = start.pretrained_model_name_or_path
    return config


def _state(stage: Stage, folder: Path, finished: Iterable[str]) -> str:
    missing = [name for name in stage.needs if name not in finished]
    if missing:
        return f"after {missing[-1]}"
    record = Record.of(stage, folder)
    key = stage_fingerprints.key(stage)
    if record.finished(stage, key):
        return FINISHED
    if stage.kind == "train" and belongs_to(Path(stage.folder), key):
        from unlora.trainer.checkpoints import whole_checkpoints

        if checkpoints := whole_checkpoints(Path(stage.folder)):
            return f"goes on at step {checkpoints[-1].name.rpartition('-')[2]}"
    return "to run"


def _num_rows(config: Config) -> int | None:
    """Rows of one epoch, where they are on this machine: those of what anchors the batches."""
    part = "train" if config.mode == "finetune" else str(config.data.get("anchor") or "forget")
    total = 0
    sets: Mapping[str, Any] = dict(config.data).get(part) or {}  # type: ignore[assignment]
    for declared in sets.values():
        rows = stage_fingerprints.local_rows(declared["args"]["hf_args"], config.paths.datasets_dir)
        if rows is None or declared["handler"] == "PretrainingDataset":  # pieces of texts
            return None
        total += len(rows)
    return total


def num_steps(args: Mapping[str, Any], rows: int) -> int:
    """Optimiser steps of a training on so many rows, of its ``trainer.args``."""
    if args.get("max_steps", -1) > 0:
        return int(args["max_steps"])
    size = args.get("per_device_train_batch_size", 8)
    batches = math.ceil(rows / (ROWS_AT_ONCE if size == "auto" else size))
    steps = math.ceil(batches / args.get("gradient_accumulation_steps", 1))
    return math.ceil(steps * args.get("num_train_epochs", 3))


class Times:
    """How long stages take, as far as any of their kind was run."""

    def __init__(self, study: Study, folder: Path, stages: Sequence[Stage]):
        self.study = study
        self.steps: dict[str, list[float]] = {}
        self.others: dict[str, list[float]] = {}
        for stage in stages:
            known = Record.of(stage, folder).read()
            if known.get("state") != FINISHED:
                continue
            if stage.kind != "train":
                self.others.setdefault(stage.kind, []).append(known["seconds"])
            elif steps := _steps_of(Path(stage.folder)):
                self.steps.setdefault(stage.config, []).append(known["seconds"] / steps)

    def of_kind(self, kind: str) -> float | None:
        """Seconds of a stage that trains nothing."""
        return fmean(self.others[kind]) if kind in self.others else None

    def of_step(self, stage: Stage) -> float | None:
        """Seconds of one optimiser step of a training like this one."""
        if stage.config not in self.steps:
            self.steps[stage.config] = [_first_steps(_from_the_start(self.study, stage))]
        return fmean(self.steps[stage.config])


def _steps_of(folder: Path) -> int | None:
    try:
        steps: int = json.loads((folder / "manifest.json").read_text("utf-8"))["optimiser_steps"]
        return steps
    except (OSError, ValueError, KeyError):
        return None


def _first_steps(config: dict[str, Any]) -> float:
    """Seconds of a step, from the first few of a training; what they make is thrown away."""
    from unlora.recipes import train

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        config["paths"] = {**config["paths"], "output_dir": str(folder)}
        config["trainer"]["args"] |= {
            "max_steps": STEPS, "save_strategy": "no", "report_to": "none", "logging_steps": 1,
            "output_dir": str(folder),
        }  # fmt: skip
        with output_to(Path(scratch) / "log.txt"):
            started = time.time()
            train.run(config, evaluate=False)
            history = json.loads((folder / "manifest.json").read_text("utf-8"))["training"]
        runtime = next((log["train_runtime"] for log in history if "train_runtime" in log), None)
        return float(runtime or time.time() - started) / STEPS


def _cells(forecast: Forecast) -> tuple[str, ...]:
    return (
        forecast.stage.name,
        forecast.state,
        "" if forecast.rows is None else f"{forecast.rows:,}",
        "" if forecast.steps is None else f"{forecast.steps:,}",
        "" if forecast.trained is None else f"{forecast.trained / 1e6:.1f} M",
        "" if forecast.memory is None else f"{forecast.memory / GB:.2f} GB",
        "" if forecast.seconds is None else in_time(forecast.seconds),
    )


def in_time(seconds: float) -> str:
    """Seconds as people read them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
