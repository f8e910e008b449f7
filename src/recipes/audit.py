"""Audit a run: put attacks to it, its target and its retain model, and judge what is left.

unlora audit saves/unlearn/NAME
"""

import json
import logging
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from unlora.audits.attack import ATTACKS, Attack, mean_logps
from unlora.audits.attack_runner import AttackRunner
from unlora.audits.membership import membership
from unlora.audits.residual import Comparison
from unlora.audits.scores import AuditScores, judged, probability, value_content
from unlora.audits.subject import collecting_soon, release
from unlora.audits.verdict import Thresholds
from unlora.config.audit_config import PARTS, AuditConfig
from unlora.data.cache import cache_folder
from unlora.errors import InputError
from unlora.evals.passes.declaration import Settings
from unlora.evals.progress import without_library_bars
from unlora.evals.records import Scored
from unlora.evals.result_cache import ResultCache
from unlora.model.adapter_scale import why_not_scalable
from unlora.recipes.audited_run import AuditedRun, find_run
from unlora.registry import check_settings
from unlora.results.audit_log import FOLDER, SCORES, as_text, write_audit
from unlora.results.run_result import read_run
from unlora.runs.atomic_files import is_main_process, write_json
from unlora.runs.run import Run, alone, full_disk_in_words
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
        scores = content.pop("scores")
        record.begin(fresh=False)
        if is_main_process():
            write_json(folder / SCORES, scores)
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
    """The content of ``AUDIT.json`` for a run, and under ``scores`` what it is computed from."""
    before = time.process_time()
    runner = runner_for(config, audited_run)
    answers = _answers(audited_run, runner)
    comparisons, left_out = _compared(config, audited_run, attacks, runner)
    logps = {
        part: {role: mean_logps(records) for role, records in models.items()}
        for part, models in answers.items()
    }
    scores = AuditScores(comparisons, logps, _collapsed(audited_run))
    return {
        **judged(scores, thresholds, audited_run.baseline),
        "thresholds": thresholds.as_dict(),
        "baseline": audited_run.baseline,
        "forget_rows": len(audited_run.data.forget),
        "models": {model.role: model.path for model in audited_run.models},
        "delivered": config.delivered,
        "retain_probability_after": _utility_after(audited_run, attacks, left_out, runner),
        "membership": _membership(answers),
        "not_run": left_out,
        "scores": scores.as_json(),
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
        name: probability(
            mean_logps(runner.retain_records(attack, settings, audited_run.unlearned))
        )
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


def _collapsed(audited_run: AuditedRun) -> list[str]:
    """By what its evaluation calls the model broken."""
    logs: Mapping[str, Any] = {}
    if audited_run.unlearned.scale == 1:  # else it is another model than the one that was evaluated
        with suppress(InputError):
            logs = read_run(audited_run.folder).logs
    entries = [log["collapsed"] for log in logs.values() if log.get("collapsed") is not None]
    return [e.note or "its evaluation calls it collapsed" for e in entries if e.value]


def _membership(answers: Answers) -> dict[str, Any]:
    """AUC of telling forget rows from holdout rows, of each model."""
    return {
        role: {
            name: value_content(value)
            for name, value in membership(answers["forget"][role], holdout).items()
        }
        for role, holdout in answers["holdout"].items()
    }


def _show(content: Mapping[str, Any], file: Path, output: str) -> None:
    if output == "json":
        print(json.dumps(read_json(file)))  # which has no NaN
    elif output == "lines":
        print(f"{as_text(content)}\nEverything is in {file}")
