"""Compare the settings of a resumed run with those of its checkpoint.

A checkpoint records the settings that its run was made with: all that the result depends on, and
nothing of what is only kept, shown or in memory. A resumed run compares them with its own.
"""

import functools
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from unlora.data import fingerprint
from unlora.data.chat_encoding import Encoded
from unlora.data.pairs import Parts
from unlora.errors import InputError
from unlora.model.fingerprints import NOT_OF_THE_MODEL
from unlora.runs.redaction import without_secrets
from unlora.trainer.argument_table import DECIDES
from unlora.trainer.checkpoints import read_record

PACKAGES = ("torch", "transformers", "peft", "accelerate")
CODE = ("data", "forward", "model", "objectives", "trainer", "recipes/train.py",
        "recipes/training.py", "recipes/training_plan.py")  # fmt: skip
# where a suite's figures are written and how they are asked, not what they are
NOT_OF_A_SUITE = ("output_dir", "overwrite", "cache", "batch_size", "token_budget")
CHOOSES_BEST = ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "save_strategy",
                "save_steps", "metric_for_best_model", "greater_is_better")  # fmt: skip
# a checkpoint holds what belongs to them, and fits nothing else
FOR_GOOD = ("model.use_lora", "model.lineage", "model.lora_config.", "root", "trainer.handler",
            "trainer.plugins.", "processes")  # fmt: skip
DROPOUT = "model.lora_config.lora_dropout"
Settings = dict[str, Any]


def run_settings(
    config: Mapping[str, Any], args: TrainingArguments, parts: Parts, root: Any
) -> Settings:
    """All that the result of a training depends on: dotted key -> value.

    Args:
        config: the sections ``model``, ``trainer`` and ``eval``.
        args: as they are in effect.
        root: hashes of the root's weights and of every adapter on it.
    """
    model, trainer = dict(config["model"]), dict(config["trainer"])
    model["model_args"] = {
        k: v for k, v in model["model_args"].items() if k not in NOT_OF_THE_MODEL and v is not None
    }
    for key in (
        "tokenizer_args",
        "targets",
        "as_trained",
        *(["lora_config"] * (not model["use_lora"])),
    ):
        model.pop(key, None)
    names = [*DECIDES, *(CHOOSES_BEST if args.load_best_model_at_end else ())]
    trainer["args"] = {name: getattr(args, name) for name in names if hasattr(args, name)}
    # the rows say the last
    for key in ("on_change", "needs_alternates", "batch_is_auto", "score_forget_end"):
        trainer.pop(key, None)
    content = {"model": model, "trainer": trainer, "root": root}
    if args.load_best_model_at_end:
        content["eval"] = {
            name: {k: v for k, v in suite.items() if k not in NOT_OF_A_SUITE}
            for name, suite in config["eval"].items()
        }
    content["rows of a step"] = (
        args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    )
    if args.deepspeed or args.fsdp:  # whose files are one for each process
        content["processes"] = args.world_size
    content["data"] = {part: _rows(rows) for part, rows in parts.rows.items()}
    content["data"]["anchor"] = parts.anchor
    versions = {name: metadata.version(name).partition("+")[0] for name in PACKAGES}
    content["packages"] = {**versions, "unlora": _code()}
    flat = without_secrets(dict(_flat(content)))
    settings: Settings = json.loads(json.dumps(flat, default=_plain, sort_keys=True))
    return settings


def differences(before: Settings, now: Settings) -> dict[str, dict[str, Any]]:
    """Key -> its value before and now, of the settings that differ."""
    return {
        key: {"before": before.get(key), "now": now.get(key)}
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }


@dataclass(frozen=True)
class Resumption:
    """What a run was made with, and what it goes on from; its checkpoints record it.

    Attributes:
        settings: see :func:`run_settings`.
        resumed: for each time that the run was resumed, this time last: the ``checkpoint``, the
            ``seconds`` that the run had taken, and what was ``changed``.
        record: of the checkpoint.
        started: by the clock that is never set.
    """

    settings: Settings = field(default_factory=dict)
    resumed: Sequence[Mapping[str, Any]] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """What the run has taken until now, the parts before its checkpoints included."""
        return float(self.record.get("seconds") or 0) + time.monotonic() - self.started

    def facts(self) -> dict[str, Any]:
        """What a checkpoint records."""
        return {
            "settings": self.settings,
            "resumed": list(self.resumed),
            "seconds": round(self.seconds, 1),
        }

    @contextmanager
    def keeping_rates(self, trainer: Any) -> Iterator[None]:
        """Let a checkpoint's optimiser keep the settings of this run where they were changed.

        What is read within has those that the checkpoint was written with. The schedule is where it
        would be had the whole run had the settings of now.
        """
        if not (self.resumed and self.resumed[-1]["changed"]):
            yield
            return
        optimizer, schedule = trainer.optimizer, trainer.lr_scheduler
        now = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        rates = list(getattr(schedule, "base_lrs", ()))
        yield
        for group, settings in zip(optimizer.param_groups, now, strict=True):
            group.update(settings)
        if not hasattr(schedule, "lr_lambdas"):
            return  # it follows a metric, and so the rates of the checkpoint
        schedule.base_lrs = rates
        schedule._last_lr = [
            rate * at(schedule.last_epoch)
            for rate, at in zip(rates, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(optimizer.param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate


def resumption(checkpoint: str | None, now: Settings, on_change: str) -> Resumption:
    """Compare the settings of a run with those of the checkpoint that it goes on from.

    Args:
        on_change: ``resume`` goes on with the settings of now, as far as the checkpoint allows it.

    Raises:
        InputError: the settings differ; all that do are named.
    """
    if checkpoint is None:
        return Resumption(now)
    record = read_record(checkpoint)
    changed = differences(record["settings"], now) if "settings" in record else {}
    for_good = [key for key in changed if key.startswith(FOR_GOOD) and key != DROPOUT]
    if for_good or (changed and on_change != "resume"):
        lines = [f"  {key}: {_shown(x['before'])} then, {_shown(x['now'])} now"
                 for key, x in changed.items()]  # fmt: skip
        consent = (
            f"A checkpoint cannot be gone on from with another {for_good[0]}."
            if for_good
            else "To go on with those of now, set trainer.on_change=resume."
        )
        raise InputError(
            f"The run of the checkpoint {checkpoint!r} had other settings:\n"
            + "\n".join(lines)
            + "\nGive those it had, or another task_name for a run of its own. "
            + consent
        )
    entry: dict[str, Any] = {"checkpoint": Path(checkpoint).name, "seconds": record.get("seconds")}
    entry["changed"] = changed if "settings" in record else "not known: it records no settings"
    return Resumption(now, [*record.get("resumed", []), entry], record)


def _shown(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _flat(content: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    """Every value below, under its dotted key."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _rows(rows: Sequence[Encoded]) -> str:
    known = fingerprint(rows)
    return f"{known['rows']} rows ({str(known['sha256'])[:16]})"


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else str(value)


@functools.cache
def _code() -> str:
    """A hash of the code that trains, short enough to be read."""
    digest = hashlib.sha256()
    home = Path(__file__).parents[1]
    for name in CODE:
        path = home / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
