"""Audit a run: put attacks to it, its target and its retain model, and judge what is left.

unlora audit saves/unlearn/NAME
"""

import dataclasses
import json
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from unlora.audits.attack import ATTACKS, Attack, mean_logps
from unlora.audits.residual import Comparison, Held, Residual, draws_of, held, residual
from unlora.audits.runner import AttackRunner
from unlora.audits.subject import collecting_soon, release
from unlora.audits.traces import membership, recognisable
from unlora.audits.verdict import Thresholds, Verdict, judge
from unlora.config.audit import PARTS, AuditConfig
from unlora.data.cache import cache_folder
from unlora.errors import InputError
from unlora.evals.passes.registry import Settings
from unlora.evals.progress import without_library_bars
from unlora.evals.records import Scored
from unlora.evals.result_cache import ResultCache
from unlora.model.adapter_scale import why_not_scalable
from unlora.recipes.audited_run import AuditedRun, find_run
from unlora.registry import check_settings
from unlora.results.audit_log import FOLDER, as_text, write_audit
from unlora.results.collapse import CollapseRule
from unlora.results.run_result import read_run
from unlora.results.value import Value
from unlora.runs.run import Run, alone, full_disk_in_words, is_main_process
from unlora.runs.safe_loading import read_json

Attacks = Mapping[str, tuple[Attack, dict[str, Any]]]
Answers = dict[str, dict[str, list[Scored]]]  # part of the data -> role -> records
logger = logging.getLogger("unlora.recipes.audit")


def run(config: AuditConfig) -> dict[str, Any]:
    """Audit the run of a config; what was asked before is not asked again.

    Returns:
        The content of ``AUDIT.json``.

    Raises:
        InputError: something in the config, the models or the data can be put right.
    """
    attacks, thresholds = attacks_of(config), thresholds_of(config)
    audited_run = find_run(config)
    folder = Path(config.output_dir or audited_run.folder / FOLDER)
    with (
        alone(folder, "audit"),
        full_disk_in_words(folder),
        without_library_bars(),
        collecting_soon(),
    ):
        record = Run(str(folder), config.model_dump(), kind="audit")
        content = audited(config, audited_run, attacks, thresholds)
        record.begin(fresh=False)
        if is_main_process():
            _show(content, write_audit(folder, content), config.output)
    record.finish(verdict=content["verdict"], cpu_seconds=content["cpu_seconds"])
    return content


def runner_for(config: AuditConfig, audited_run: AuditedRun) -> AttackRunner:
    """Make what asks the models of a run, within the limits of the config."""
    cache = ResultCache(cache_folder() / "answers" if config.cache else None)
    limits = Settings(batch_size=config.batch_size, tokens=config.token_budget)
    return AttackRunner(audited_run.data, audited_run.target, cache, limits)


def attacks_of(config: AuditConfig) -> Attacks:
    """Name -> attack and settings, the plain question first.

    Raises:
        InputError: every mistake found, one a line.
    """
    chosen, wrong = {}, []
    sections = {"plain": {"handler": "plain"}, **config.audit}
    for name, section in sections.items():
        if section is None and name != "plain":
            continue
        settings = dict(section or {})
        try:
            if "handler" not in settings:
                raise InputError("it has no handler. Known: " + ", ".join(ATTACKS) + ".")
            attack = ATTACKS[settings.pop("handler")]
            chosen[name] = attack, attack.configured(settings)
        except InputError as error:
            wrong.append(f"audit.{name}: {error}")
    if wrong:
        raise InputError("\n".join(wrong))
    return chosen


def thresholds_of(config: AuditConfig) -> Thresholds:
    """The thresholds of the verdict, with those that the config sets.

    Raises:
        InputError: there is no such threshold, or it wants a number.
    """
    defaults = {k: float(v) for k, v in Thresholds().as_dict().items()}
    return Thresholds(**check_settings("thresholds", defaults, config.thresholds))  # type: ignore[arg-type]


def audited(
    config: AuditConfig, audited_run: AuditedRun, attacks: Attacks, thresholds: Thresholds
) -> dict[str, Any]:
    """The content of ``AUDIT.json`` for a run."""
    before = time.process_time()
    runner = runner_for(config, audited_run)
    answers = _answers(audited_run, runner)
    comparisons, left_out = _compared(config, audited_run, attacks, runner)
    draws = draws_of(len(audited_run.data.forget))
    residuals = [residual(comparison, draws) for comparison in comparisons]
    largest = held(comparisons, draws)
    share = _recognisable(answers)
    reasons = _collapsed(audited_run, answers)
    plain = next(row for row in residuals if row.attack == "plain")
    verdict = judge(plain, largest, reasons, share, thresholds, audited_run.baseline)
    utility = {role: probability(records) for role, records in answers["retain"].items()}
    return {
        **_written(verdict, largest, residuals),
        "thresholds": thresholds.as_dict(),
        "baseline": audited_run.baseline,
        "forget_rows": len(audited_run.data.forget),
        "models": {model.role: model.path for model in audited_run.models},
        "delivered": config.delivered,
        "retain_probability": utility,
        "retain_probability_after": _utility_after(audited_run, attacks, left_out, runner),
        "recognisable": _value(share),
        "membership": _membership(answers),
        "not_run": left_out,
        "cpu_seconds": round(time.process_time() - before, 1),
    }


def _compared(
    config: AuditConfig,
    audited_run: AuditedRun,
    attacks: Attacks,
    runner: AttackRunner,
) -> tuple[list[Comparison], dict[str, str]]:
    """Every form of every attack; and those that cannot be run -> why."""
    comparisons: list[Comparison] = []
    left_out: dict[str, str] = {}
    quiet = True if config.output == "quiet" else None
    with tqdm(total=len(attacks) * 3, file=sys.stderr, leave=False, disable=quiet) as bar:
        for name, (attack, settings) in attacks.items():
            bar.set_description(f"audit: {name}")
            logger.info("attack %s", name)
            if why := _why_not(attack, audited_run):
                left_out[name] = why
                bar.update(3)
                continue
            counts = not attack.of_adapters or config.delivered == "adapter"
            try:
                forms = runner.compare(
                    name, attack, settings, audited_run.models,
                    counts=counts, done=lambda _: bar.update(1),
                )  # fmt: skip
            except InputError as error:  # the models could be asked plainly, so it is the attack's
                left_out[name] = str(error)
                continue
            if not forms:
                left_out[name] = "it has nothing to ask of these rows"
            comparisons += forms
    return comparisons, left_out


def _utility_after(
    audited_run: AuditedRun,
    attacks: Attacks,
    left_out: Mapping[str, str],
    runner: AttackRunner,
) -> dict[str, float]:
    """Attack on the merged weights -> probability of the retain answers after it."""
    if audited_run.data.retain is None:
        return {}
    return {
        name: probability(runner.retain_records(attack, settings, audited_run.unlearned))
        for name, (attack, settings) in attacks.items()
        if attack.kind == "merged" and name not in left_out
    }


def _why_not(attack: Attack, audited_run: AuditedRun) -> str | None:
    """Why an attack cannot be put to these models and rows, where that is so."""
    links = audited_run.unlearned.resolved.lineage.links
    if attack.of_adapters and not links:
        return "the model has no adapter"
    if attack.of_adapters and (why := why_not_scalable(links[-1].path)):
        return why
    if attack.kind == "sample" and not audited_run.data.forget.is_qa:
        return "running text has no question"
    changes = attack.kind in ("merged", "training")
    if changes and any(model.resolved.quantised for model in audited_run.models):
        return "the weights are quantised already, and nothing can be merged into them"
    return None


def _answers(audited_run: AuditedRun, runner: AttackRunner) -> Answers:
    """What every model says of the answers of every part, plainly asked."""
    answers: Answers = {part: {} for part in PARTS}
    for model in audited_run.models:
        lazy = model.plain()  # loaded once for all parts
        for part in PARTS:
            source = getattr(audited_run.data, part)
            if source is not None:
                answers[part][model.role] = runner.records(lazy, source)
        del lazy
        release()
    return answers


def _collapsed(audited_run: AuditedRun, answers: Answers) -> list[str]:
    """By what the model is broken: as its evaluation has it, or by what it says of retain rows."""
    reasons = []
    logs: Mapping[str, Any] = {}
    if audited_run.unlearned.scale == 1:  # else it is another model than the one that was evaluated
        with suppress(InputError):
            logs = read_run(audited_run.folder).logs
    for log in logs.values():
        entry = log.get("collapsed")
        if entry is not None and entry.value:
            reasons.append(entry.note or "its evaluation calls it collapsed")
    retain = {role: probability(records) for role, records in answers["retain"].items()}
    if not reasons and retain:
        rule = CollapseRule(utility_floor=0.0)
        nan, before = float("nan"), retain["target"]
        rows = 0 if math.isnan(before) else len(answers["retain"]["unlearned"])
        judged = rule.judge(retain["unlearned"], nan, before, rows).reasons
        reasons += [f"of the retain rows, {reason}" for reason in judged]
    return reasons


def _recognisable(answers: Answers) -> Value | None:
    if not answers["holdout"]:
        return None
    roles = ("unlearned", "retain")
    forget, holdout = (
        [mean_logps(answers[part][role]) for role in roles] for part in ("forget", "holdout")
    )
    return recognisable(*forget, *holdout)


def _membership(answers: Answers) -> dict[str, Any]:
    """AUC of telling forget rows from holdout rows, of each model."""
    return {
        role: {
            name: _value(value)
            for name, value in membership(answers["forget"][role], holdout).items()
        }
        for role, holdout in answers["holdout"].items()
    }


def probability(records: Sequence[Scored]) -> float:
    """Mean over rows of the geometric mean of the tokens' probabilities."""
    return float(np.nanmean(np.exp(mean_logps(records))))


def _value(value: Value | None) -> dict[str, Any] | None:
    return None if value is None else {"value": value.value, "interval95": value.interval}


def _written(
    verdict: Verdict, largest: Held | None, residuals: Sequence[Residual]
) -> dict[str, Any]:
    forms = []
    for row in residuals:
        entry = dataclasses.asdict(row)
        entry["residual"], entry["interval95"] = entry.pop("value"), entry.pop("interval")
        entry["means"] = dict(zip(("unlearned", "target", "retain"), row.means, strict=True))
        forms.append(entry)
    bound = None if largest is None else dataclasses.asdict(largest)
    if bound is not None:
        bound["interval95"] = bound.pop("interval")
    return {"verdict": dataclasses.asdict(verdict), "held": bound, "attacks": forms}


def _show(content: Mapping[str, Any], file: Path, output: str) -> None:
    if output == "json":
        print(json.dumps(read_json(file)))  # which has no NaN
    elif output == "lines":
        print(f"{as_text(content)}\nEverything is in {file}")
