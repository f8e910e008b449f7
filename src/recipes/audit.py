"""Audit a run: put attacks to it, its target and its retain model, and judge what is left.

    unlora audit saves/unlearn/NAME
"""

import dataclasses
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from unlora.audits.attack import ATTACKS, Attack
from unlora.audits.residual import Comparison, Held, Residual, draws_of, held, residual
from unlora.audits.runner import AttackRunner
from unlora.audits.traces import membership, recognisable
from unlora.audits.verdict import Thresholds, Verdict, judge
from unlora.config.audit import AuditConfig
from unlora.data.cache import cache_folder
from unlora.errors import InputError
from unlora.evals.passes.registry import Settings
from unlora.evals.result_cache import ResultCache
from unlora.recipes.audited_run import AuditedRun, find_run
from unlora.registry import check_settings
from unlora.results.audit_log import FOLDER, write_audit
from unlora.results.collapse import CollapseRule
from unlora.results.run_result import read_run
from unlora.results.value import Value
from unlora.runs.run import Run, alone, full_disk_in_words

Answers = dict[str, dict[str, np.ndarray]]  # part of the data -> role -> mean log-probabilities
logger = logging.getLogger("unlora.recipes.audit")


def run(config: AuditConfig) -> dict[str, Any]:
    """Audit the run of a config; what was asked before is not asked again.

    Returns:
        The content of ``AUDIT.json``.

    Raises:
        InputError: something in the config, the models or the data can be put right.
    """
    attacks, thresholds = _attacks(config), _thresholds(config)
    found = find_run(config)
    folder = Path(config.output_dir or found.folder / FOLDER)
    with alone(folder, "audit"), full_disk_in_words(folder):
        record = Run(str(folder), config.model_dump(), kind="audit")
        content = _audited(config, found, attacks, thresholds)
        record.begin(fresh=False)
        file = write_audit(folder, content)
    record.finish(verdict=content["verdict"], cpu_seconds=content["cpu_seconds"])
    _show(content, file, config.output)
    return content


def _attacks(config: AuditConfig) -> dict[str, tuple[Attack, dict[str, Any]]]:
    """Name -> attack and settings, the plain question first.

    Raises:
        InputError: every mistake found, one a line.
    """
    found, wrong = {}, []
    sections = {"plain": {"handler": "plain"}, **config.audit}
    for name, section in sections.items():
        if section is None and name != "plain":
            continue
        settings = dict(section or {})
        try:
            if "handler" not in settings:
                raise InputError("it has no handler. Known: " + ", ".join(ATTACKS) + ".")
            attack = ATTACKS[settings.pop("handler")]
            found[name] = attack, attack.configured(settings)
        except InputError as error:
            wrong.append(f"audit.{name}: {error}")
    if wrong:
        raise InputError("\n".join(wrong))
    return found


def _thresholds(config: AuditConfig) -> Thresholds:
    defaults = {k: float(v) for k, v in Thresholds().as_dict().items()}
    return Thresholds(**check_settings("thresholds", defaults, config.thresholds))  # type: ignore[arg-type]


def _audited(
    config: AuditConfig,
    found: AuditedRun,
    attacks: Mapping[str, tuple[Attack, dict[str, Any]]],
    thresholds: Thresholds,
) -> dict[str, Any]:
    before = time.process_time()
    limits = {"batch_size": config.batch_size, "tokens": config.token_budget}
    cache = ResultCache(cache_folder() / "answers" if config.cache else None)
    runner = AttackRunner(
        found.data, found.target, cache, Settings(**{k: v for k, v in limits.items() if v})
    )
    comparisons, left_out = _compared(config, found, attacks, runner)
    draws = draws_of(len(found.data.forget))
    answers = _answers(found, runner)
    residuals = [residual(one, draws) for one in comparisons]
    largest = held(comparisons, draws)
    share = _recognisable(answers)
    reasons = _collapsed(found, answers)
    plain = next(one for one in residuals if one.attack == "plain")
    verdict = judge(plain, largest, reasons, share, thresholds, found.baseline)
    utility = {role: _probability(scores) for role, scores in answers["retain"].items()}
    return {
        **_written(verdict, largest, residuals),
        "thresholds": thresholds.as_dict(),
        "baseline": found.baseline,
        "forget_rows": len(found.data.forget),
        "models": {model.role: model.path for model in found.models},
        "delivered": config.delivered,
        "retain_probability": utility,
        "recognisable": _value(share),
        "membership": _membership(found, runner),
        "not_run": left_out,
        "cpu_seconds": round(time.process_time() - before, 1),
    }


def _compared(
    config: AuditConfig,
    found: AuditedRun,
    attacks: Mapping[str, tuple[Attack, dict[str, Any]]],
    runner: AttackRunner,
) -> tuple[list[Comparison], dict[str, str]]:
    """Every form of every attack; and those that cannot be run -> why."""
    comparisons: list[Comparison] = []
    left_out: dict[str, str] = {}
    with tqdm(total=len(attacks) * 3, unit="model", desc="audit", file=sys.stderr, leave=False,
              dynamic_ncols=True, disable=True if config.output == "quiet" else None) as bar:  # fmt: skip
        for name, (attack, settings) in attacks.items():
            bar.set_description(f"audit: {name}")
            logger.info("attack %s", name)
            if why := _why_not(attack, found):
                left_out[name] = why
                bar.update(3)
                continue
            counts = not attack.of_adapters or config.delivered == "adapter"
            forms = runner.compare(
                name, attack, settings, found.models, counts=counts, done=lambda _: bar.update(1)
            )
            if not forms:
                left_out[name] = "it has nothing to ask of these rows"
            comparisons += forms
    return comparisons, left_out


def _why_not(attack: Attack, found: AuditedRun) -> str | None:
    """Why an attack cannot be put to these models and rows, where that is so."""
    if attack.of_adapters and not found.unlearned.resolved.lineage.links:
        return "the model has no adapter"
    if attack.kind == "sample" and not found.data.forget.is_qa:
        return "running text has no question"
    changes = attack.kind in ("merged", "training")
    if changes and any(model.resolved.quantised for model in found.models):
        return "the weights are quantised already, and nothing can be merged into them"
    if attack.kind == "training" and found.data.retain is None and attack.settings.get("on"):
        return None
    return None


def _answers(found: AuditedRun, runner: AttackRunner) -> Answers:
    """Mean log-probabilities of the answers of every part, plainly asked."""
    sources = {name: getattr(found.data, name) for name in ("forget", "retain", "holdout")}
    return {
        part: {
            model.role: np.array([-one.loss for one in runner.records(model.plain(), source)])
            for model in found.models
        }
        if source
        else {}
        for part, source in sources.items()
    }


def _collapsed(found: AuditedRun, answers: Answers) -> list[str]:
    """By what the model is broken: as its evaluation has it, or by what it says of retain rows."""
    reasons = []
    try:
        logs = read_run(found.folder).logs
    except InputError:
        logs = {}
    for log in logs.values():
        entry = log.get("collapsed")
        if entry is not None and entry.value:
            reasons.append(entry.note or "its evaluation calls it collapsed")
    retain = {role: _probability(scores) for role, scores in answers["retain"].items()}
    if not reasons and retain:
        rule = CollapseRule(utility_floor=0.0)
        nan = float("nan")
        judged = rule.judge(retain["unlearned"], nan, retain["target"]).reasons
        reasons += [f"of the retain rows, {reason}" for reason in judged]
    return reasons


def _recognisable(answers: Answers) -> Value | None:
    if not answers["holdout"]:
        return None
    forget, holdout = answers["forget"], answers["holdout"]
    return recognisable(
        forget["unlearned"], forget["retain"], holdout["unlearned"], holdout["retain"]
    )


def _membership(found: AuditedRun, runner: AttackRunner) -> dict[str, Any]:
    """AUC of telling forget rows from holdout rows, of each model."""
    if found.data.holdout is None:
        return {}
    return {
        model.role: {
            name: _value(value)
            for name, value in membership(
                runner.records(model.plain(), found.data.forget),
                runner.records(model.plain(), found.data.holdout),
            ).items()
        }
        for model in found.models
    }


def _probability(logps: np.ndarray) -> float:
    """Mean over rows of the geometric mean of the tokens' probabilities."""
    return float(np.nanmean(np.exp(logps)))


def _value(value: Value | None) -> dict[str, Any] | None:
    return None if value is None else {"value": value.value, "interval95": value.interval}


def _written(
    verdict: Verdict, largest: Held | None, residuals: Sequence[Residual]
) -> dict[str, Any]:
    forms = []
    for one in residuals:
        entry = dataclasses.asdict(one)
        entry["residual"], entry["interval95"] = entry.pop("value"), entry.pop("interval")
        entry["means"] = dict(zip(("unlearned", "target", "retain"), one.means, strict=True))
        forms.append(entry)
    found = None if largest is None else dataclasses.asdict(largest)
    if found is not None:
        found["interval95"] = found.pop("interval")
    return {"verdict": dataclasses.asdict(verdict), "held": found, "attacks": forms}


def as_text(content: Mapping[str, Any]) -> str:
    """A line for each form of an attack, and the verdict."""
    show = "{:44} {:>9} {:>18}  {}".format
    lines = [show("attack", "residual", "95 %", "")]
    for one in content["attacks"]:
        value, bounds = one["residual"], one["interval95"]
        interval = "[{:.2f}, {:.2f}]".format(*bounds) if bounds else ""
        note = "" if one["counts"] else "only where the adapter is delivered"
        if not one["tells"]:
            note = "tells target and retain model not apart: left out"
        lines.append(show(one["name"], f"{value:.2f}", interval, note).rstrip())
    lines += [f"{name}: not run: {why}" for name, why in content["not_run"].items()]
    limits = ", ".join(f"{key} {value:g}" for key, value in content["thresholds"].items())
    return "\n".join([*lines, "", content["verdict"]["sentence"], f"(thresholds: {limits})"])


def _show(content: Mapping[str, Any], file: Path, output: str) -> None:
    if output == "json":
        print(json.dumps(content))
    elif output == "lines":
        print(f"{as_text(content)}\nEverything is in {file}")
