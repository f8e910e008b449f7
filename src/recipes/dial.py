"""Dial a run: scale its unlearning adapter to where it does what is asked for.

unlora dial saves/unlearn/NAME --to audit
"""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from unlora.audits.dial import SCALES, Point, largest_scale, least_scale, rounded
from unlora.audits.residual import Comparison, draws_of, residual
from unlora.audits.runner import AttackRunner
from unlora.config.audit import AuditConfig
from unlora.errors import InputError
from unlora.evals.eval_model import LazyModel
from unlora.evals.progress import without_library_bars
from unlora.model.adapter_scale import scaled, why_not_scalable, write_scaled
from unlora.recipes.audit import attacks_of, audited, probability, runner_for, thresholds_of
from unlora.recipes.audited_run import AuditedRun, find_run
from unlora.results.audit_log import FOLDER
from unlora.runs.run import alone, write_json

FILE = "DIAL.json"
logger = logging.getLogger("unlora.recipes.dial")


class Dial:
    """A run whose last adapter is turned; every scale is asked about once."""

    def __init__(self, config: AuditConfig, found: AuditedRun) -> None:
        self.config, self.found = config, found
        self.runner: AttackRunner = runner_for(config, found)
        self.attacks, self.thresholds = attacks_of(config), thresholds_of(config)
        self.points: dict[float, Point] = {}
        self.audits: dict[float, Mapping[str, Any]] = {}

    def point(self, scale: float) -> Point:
        """What the model says at a scale, asked plainly."""
        if scale not in self.points:
            logger.info("scale %.2f", scale)
            data, (forget, *others) = self.found.data, self._answers(scale)
            target, retain = self.compared
            scores = np.array([-one.loss for one in forget])
            plain = residual(
                Comparison("plain", "plain", scores, target, retain), draws_of(len(data.forget))
            )
            found = (None if records is None else probability(records) for records in others)
            self.points[scale] = Point(scale, plain.value, *found)
        return self.points[scale]

    def _answers(self, scale: float) -> list[Any]:
        """Records of the forget, retain and holdout rows; None where there are no such rows."""
        data, model = self.found.data, self.found.unlearned

        def turned() -> Any:
            within.enter_context(scaled(self.network, model.last_adapter, scale))
            return self.network

        with ExitStack() as within:
            lazy = LazyModel(turned, model.at(scale).key)
            return [
                None if source is None else self.runner.records(lazy, source)
                for source in (data.forget, data.retain, data.holdout)
            ]

    @cached_property
    def network(self) -> Any:
        """The unlearned model, loaded once; its weights stay as they are."""
        return self.found.unlearned.load()

    @cached_property
    def compared(self) -> list[np.ndarray]:
        """What target and retain model say of the forget rows."""
        models = (self.found.target, self.found.retain)
        return [
            np.array([-one.loss for one in self.runner.records(m.plain(), self.found.data.forget)])
            for m in models
        ]

    def audit(self, scale: float) -> Mapping[str, Any]:
        """The audit of the model at a scale."""
        if scale not in self.audits:
            logger.info("audit at scale %.2f", scale)
            at = dataclasses.replace(self.found, unlearned=self.found.unlearned.at(scale))
            self.audits[scale] = audited(self.config, at, self.attacks, self.thresholds)
        return self.audits[scale]

    def forgets_plainly(self, scale: float) -> bool:
        """Whether it knows no more than the retain model."""
        return self.point(scale).residual <= 0

    def holds(self, scale: float) -> bool:
        """Whether no attack brings more back than a verdict of *held* allows."""
        held = self.audit(scale)["held"]
        plain = self.audit(scale)["attacks"][0]["residual"]
        return bool(
            held
            and held["interval95"][1] <= self.thresholds.hidden
            and plain <= self.thresholds.known
        )

    def keeps(self, share: float) -> Callable[[float], bool]:
        """Whether the retain answers keep a share of their probability under the target."""
        data = self.found.data
        if data.retain is None:
            raise InputError("There are no retain rows to tell the utility by. Give data.retain.")
        before = probability(self.runner.records(self.found.target.plain(), data.retain))
        return lambda scale: (self.point(scale).retain or 0.0) >= share * before


def run(config: AuditConfig, to: str = "audit", output: str | None = None) -> Path | None:
    """Find the scale, and write the model at that scale as a run folder of its own.

    Args:
        to: ``audit`` (the least scale that holds under attack), ``plain`` (no more than the retain
            model where it is asked plainly), or ``utility=SHARE`` (the largest that keeps this
            share of the retain answers' probability).
        output: the new folder; ``RUN-dial-0.78`` if not given.

    Returns:
        The new folder; None where no scale does it.

    Raises:
        InputError: the run cannot be scaled exactly, or something that was given is wrong.
    """
    share = utility_of(to)
    found = find_run(config)
    if why := why_not_scalable(found.folder):
        raise InputError(why)
    before = time.process_time()
    with alone(found.folder / FOLDER, "audit"), without_library_bars():
        dial = Dial(config, found)
        for tried in SCALES:
            dial.point(tried)
        scale = _scale(dial, to, share)
        verdict = dial.audit(scale)["verdict"] if scale is not None and to == "audit" else None
        if verdict and verdict["name"] != "held":
            scale = None
        written = None if scale is None else _write(found, scale, output)
        content = {
            "to": to,
            "scale": scale,
            "verdict": verdict,
            "run": None if written is None else str(written),
            "curve": [dataclasses.asdict(dial.points[s]) for s in sorted(dial.points)],
            "audits": [
                {"scale": s, "held": audit["held"], "verdict": audit["verdict"]}
                for s, audit in sorted(dial.audits.items())
            ],
            "cpu_seconds": round(time.process_time() - before, 1),
        }
        (found.folder / FOLDER).mkdir(exist_ok=True)
        write_json(found.folder / FOLDER / FILE, content)
    print(json.dumps(content) if config.output == "json" else as_text(content))
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


def _scale(dial: Dial, to: str, share: float | None) -> float | None:
    if share is not None:
        found = largest_scale(dial.keeps(share))
        return None if found is None else float(np.floor(found * 100 + 1e-9) / 100)
    if to == "plain":
        found = least_scale(dial.forgets_plainly)
        return None if found is None else rounded(found)
    # an audit costs more: what fails where it is asked plainly needs none
    low = least_scale(lambda scale: dial.point(scale).residual <= dial.thresholds.known)
    if low is None or not dial.holds(SCALES[-1]):
        return None
    found = least_scale(dial.holds, low=max(low - 0.02, 0.0), steps=4)
    if found is None:
        return None
    scale = rounded(found)
    return scale if dial.holds(scale) else found


def _write(found: AuditedRun, scale: float, output: str | None) -> Path:
    place = Path(output or f"{found.folder}-dial-{scale:.2f}")
    return write_scaled(found.folder, scale, place)


def as_text(content: Mapping[str, Any]) -> str:
    """The curve, and what was chosen."""
    show = "{:>6} {:>9} {:>8} {:>8}".format
    lines = [show("scale", "residual", "retain", "holdout")]
    lines += [_line(show, point) for point in content["curve"]]
    lines += _audited_lines(content["audits"])
    if content["run"]:
        lines.append(f"\nThe model at scale {content['scale']:.2f} is in {content['run']}")
        if content["verdict"]:
            lines.append(content["verdict"]["sentence"])
    else:
        lines.append(
            f"\nNo scale from 0 to {SCALES[-1]} does it (--to {content['to']}). Nothing was "
            "written."
        )
    return "\n".join(lines)


def _line(show: Any, point: Mapping[str, Any]) -> str:
    retain, holdout = (
        "" if point[name] is None else f"{point[name]:.3f}" for name in ("retain", "holdout")
    )
    return str(show(f"{point['scale']:.2f}", f"{point['residual']:.2f}", retain, holdout)).rstrip()


def _audited_lines(audits: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for one in audits:
        held = one["held"]
        bounds = "" if not held else " {:.2f} [{:.2f}, {:.2f}]".format(
            held["value"], *held["interval95"]
        )  # fmt: skip
        lines.append(f"audit at {one['scale']:.2f}: HELD{bounds}: {one['verdict']['name']}")
    return lines
