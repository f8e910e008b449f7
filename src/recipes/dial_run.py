"""Dial a run: scale its unlearning adapter to where it does what is asked for.

unlora dial saves/unlearn/NAME --to audit
"""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unlora.audits.attack import mean_logps
from unlora.audits.attack_runner import AttackRunner
from unlora.audits.residual import Comparison, draws_of, residual
from unlora.audits.scale_search import (
    FARTHER,
    LARGEST,
    SCALES,
    Point,
    largest_on_curve,
    least_on_curve,
    least_scale,
    rounded,
)
from unlora.audits.scores import probability
from unlora.audits.subject import collecting_soon
from unlora.config.audit_config import AuditConfig
from unlora.errors import InputError
from unlora.evals.eval_model import LazyModel
from unlora.evals.progress import without_library_bars
from unlora.model.adapter_scale import scaled, why_not_scalable, write_scaled
from unlora.recipes.audit import attacks_of, audited, runner_for, thresholds_of
from unlora.recipes.audited_run import AuditedRun, find_run
from unlora.results.audit_log import FOLDER
from unlora.results.dial_log import FILE, as_text
from unlora.runs.atomic_files import is_main_process, write_json
from unlora.runs.run import alone, refuse_filled
from unlora.runs.safe_loading import read_json

STEP = 0.02  # a scale is searched no finer
UNTOLD = ("too few to say", "cannot be told")  # verdicts of too few rows
logger = logging.getLogger("unlora.recipes.dial_run")


class Dial:
    """A run whose last adapter is turned; every scale is asked about once."""

    def __init__(self, config: AuditConfig, audited_run: AuditedRun) -> None:
        self.config, self.found = config, audited_run
        self.runner: AttackRunner = runner_for(config, audited_run)
        self.attacks, self.thresholds = attacks_of(config), thresholds_of(config)
        self.points: dict[float, Point] = {}
        self.said: dict[tuple[float, str], np.ndarray] = {}
        self.audits: dict[tuple[float, frozenset[str]], Mapping[str, Any]] = {}

    def point(self, scale: float) -> Point:
        """What the model says at a scale, asked plainly, of all its rows."""
        if scale not in self.points:
            retain, holdout = (self.probability(scale, part) for part in ("retain", "holdout"))
            self.points[scale] = Point(scale, self.residual(scale), retain, holdout)
        return self.points[scale]

    def residual(self, scale: float) -> float:
        """What is left at a scale; of the forget rows alone, as a search needs no others."""
        logps = self.logps(scale, "forget")
        assert logps is not None
        target, retain = self.compared
        plain = Comparison("plain", "plain", logps, target, retain)
        return residual(plain, draws_of(len(self.found.data.forget))).value

    def probability(self, scale: float, part: str) -> float | None:
        """Of the answers of retain or holdout rows; None where there are none."""
        logps = self.logps(scale, part)
        return None if logps is None else probability(logps)

    def logps(self, scale: float, part: str) -> np.ndarray | None:
        """What each answer of a part of the data is given at a scale; asked once."""
        source, model = getattr(self.found.data, part), self.found.unlearned
        if source is None or (scale, part) in self.said:
            return self.said.get((scale, part))
        logger.info("scale %.2f: %s rows", scale, part)

        def turned() -> Any:
            within.enter_context(scaled(self.network, model.last_adapter, scale))
            return self.network

        with ExitStack() as within:
            key = self.target_key if scale == 0 else model.at(scale).key
            lazy = LazyModel(turned, key)
            self.said[scale, part] = mean_logps(self.runner.records(lazy, source))
        return self.said[scale, part]

    @cached_property
    def target_key(self) -> str | None:
        """By which answers at scale 0 are kept: the run without its last adapter is its target."""
        ours, target = self.found.unlearned.resolved, self.found.target.resolved
        without = dataclasses.replace(ours.lineage, links=ours.lineage.links[:-1])
        is_target = without == target.lineage and ours.load_kwargs == target.load_kwargs
        return self.found.target.key if is_target else self.found.unlearned.at(0).key

    @cached_property
    def network(self) -> Any:
        """The unlearned model, loaded once; its weights stay as they are."""
        return self.found.unlearned.load()

    @cached_property
    def compared(self) -> list[np.ndarray]:
        """What target and retain model say of the forget rows."""
        models, forget = (self.found.target, self.found.retain), self.found.data.forget
        return [mean_logps(self.runner.records(model.plain(), forget)) for model in models]

    def audit(self, scale: float, only: frozenset[str] = frozenset()) -> Mapping[str, Any]:
        """The audit of the model at a scale, with all attacks or with these."""
        if (scale, only) not in self.audits:
            logger.info("audit at scale %.2f: %s", scale, ", ".join(sorted(only)) or "all attacks")
            at = dataclasses.replace(self.found, unlearned=self.found.unlearned.at(scale))
            attacks = {n: self.attacks[n] for n in self.attacks if not only or n in only}
            self.audits[scale, only] = audited(self.config, at, attacks, self.thresholds)
        return self.audits[scale, only]

    def search(self, to: str) -> tuple[float | None, Mapping[str, Any] | None]:
        """The scale that does what is asked for, and its verdict where that was asked for."""
        share = utility_of(to)
        if share is not None:
            largest = largest_on_curve(self.keeps(share))
            return (None if largest is None else math.floor(largest * 100 + 1e-9) / 100), None
        if to == "plain":
            largest = least_on_curve(lambda scale: self.residual(scale) <= 0, FARTHER)
            return (None if largest is None else rounded(largest)), None
        scale = self._least_held()
        if scale is None:
            return None, None
        verdict = self.audit(scale)["verdict"]
        return (scale if verdict["name"] in ("held", *UNTOLD) else None), verdict

    def _least_held(self) -> float | None:
        """The least scale at which no attack brings more back than *held* allows.

        What brings most back as trained is tried alone, as a whole audit takes long; a whole one
        at the scale that is found says whether another attack has become worse.
        """
        known = self.thresholds.known
        low = least_on_curve(lambda scale: self.residual(scale) <= known)
        if low is None:
            return None
        low, scale, tried = max(low - STEP, 0.0), 1.0, {"plain"}
        is_searched = False
        while True:
            worst, is_held = _worst(self.audit(scale)), self.holds(scale)
            if worst is None or (is_searched and is_held):
                return scale
            if worst in tried and not is_held:  # as fine as the search is, it was not enough
                if scale >= LARGEST:
                    return None
                low = scale
            tried.add(worst)
            at = partial(self.holds, only=frozenset(tried))
            least = least_scale(at, low=low, high=scale if is_held else LARGEST, steps=4)
            if least is None:
                return None
            scale, is_searched = rounded(least), True

    def holds(self, scale: float, only: frozenset[str] = frozenset()) -> bool:
        """Whether no attack, or none of these, brings more back than *held* allows."""
        audit = self.audit(scale, only)
        held, plain = audit["held"], audit["attacks"][0]["residual"]
        if held is None:
            return False
        limits = self.thresholds
        return bool(held["interval95"][1] <= limits.hidden and plain <= limits.known)

    def tried(self) -> dict[str, Any]:
        """Every scale that was asked about, for the record."""
        audits = [
            {"scale": scale, "attacks": sorted(only) or "all", "held": audit["held"],
             "verdict": audit["verdict"]}
            for (scale, only), audit in sorted(self.audits.items(), key=lambda item: item[0][0])
        ]  # fmt: skip
        return {
            "curve": [dataclasses.asdict(self.points[scale]) for scale in sorted(self.points)],
            "audits": audits,
        }

    def keeps(self, share: float) -> Callable[[float], bool]:
        """Whether the retain answers keep a share of their probability under the target."""
        data = self.found.data
        if data.retain is None:
            raise InputError("There are no retain rows to tell the utility by. Give data.retain.")
        records = self.runner.records(self.found.target.plain(), data.retain)
        before = probability(mean_logps(records))
        return lambda scale: (self.probability(scale, "retain") or 0.0) >= share * before


def run(
    config: AuditConfig,
    to: str = "audit",
    output: str | None = None,
    *,
    otherwise: Literal["plain", "trained"] | None = None,
) -> Path | None:
    """Find the scale, and write the model at that scale as a run folder of its own.

    Args:
        to: ``audit`` (the least scale that holds under attack), ``plain`` (no more than the retain
            model where it is asked plainly), or ``utility=SHARE`` (the largest that keeps this
            share of the retain answers' probability).
        output: the new folder; ``RUN-dial-0.78`` if not given.
        otherwise: what is written where no scale does it: that of ``plain``, else as trained; or as
            trained; or nothing. First comes a scale at which no attack brings more back than
            *held* allows, but whose rows are too few for a verdict.

    Returns:
        The new folder; None where no scale does it.

    Raises:
        InputError: the run cannot be scaled exactly, or something that was given is wrong.
    """
    utility_of(to)
    audited_run = find_run(config)
    if audited_run.config.get("mode") != "unlearn":
        raise InputError(f"{config.run!r} was not made to forget, so there is nothing to dial.")
    if why := why_not_scalable(audited_run.folder):
        raise InputError(why)
    if output:
        refuse_filled(Path(output))  # before the minutes that the search may take
    before = time.process_time()
    with alone(audited_run.folder / FOLDER, "audit"), without_library_bars(), collecting_soon():
        dial = Dial(config, audited_run)
        for tried in SCALES:
            dial.point(tried)
        scale, verdict = dial.search(to)
        reached = scale is not None and (verdict is None or verdict["name"] not in UNTOLD)
        if not (reached or otherwise):
            scale = None
        if otherwise == "plain" and scale is None:
            scale, _ = dial.search("plain")
        if otherwise and scale is None:
            scale = 1.0
        farther = [tried for tried in FARTHER if (tried, "forget") in dial.said]
        for shown in (*farther, scale):
            if shown is not None:
                dial.point(shown)
        written = None if scale is None else _write(audited_run, scale, output)
        content = {
            "to": to, "reached": reached, "scale": scale, "verdict": verdict,
            "run": None if written is None else str(written), **dial.tried(),
            "cpu_seconds": round(time.process_time() - before, 1),
        }  # fmt: skip
        if is_main_process():
            _finish(audited_run.folder / FOLDER / FILE, content, config.output)
    return written


def utility_of(to: str) -> float | None:
    """The share in ``utility=SHARE``.

    Raises:
        InputError: it is neither that nor ``audit`` or ``plain``.
    """
    if to in ("audit", "plain"):
        return None
    name, _, share = to.partition("=")
    try:
        number = float(share)
    except ValueError:
        number = -1.0
    if name != "utility" or not 0 < number <= 1:
        raise InputError(
            f"--to is {to!r}; it must be audit, plain, or utility=SHARE with a share above 0 and "
            "up to 1: --to utility=0.95."
        )
    return number


def _worst(audit: Mapping[str, Any]) -> str | None:
    """The attack whose upper bound is the highest."""
    forms = [form for form in audit["attacks"] if form["counts"] and not form["left_out"]]
    highest = max(forms, key=lambda form: form["interval95"][1], default=None)
    return None if highest is None else str(highest["attack"])


def _write(audited_run: AuditedRun, scale: float, output: str | None) -> Path:
    folder = Path(output or f"{audited_run.folder}-dial-{scale:.2f}")
    return write_scaled(audited_run.folder, scale, folder) if is_main_process() else folder


def _finish(file: Path, content: Mapping[str, Any], output: str) -> None:
    """Write what was found, and show it."""
    write_json(file, content)
    if output == "json":
        print(json.dumps(read_json(file)))  # which has no NaN
    elif output == "lines":
        print(as_text(content))
