"""Plan and run the stages in which a study attacks its models, and dials them to one forgetting."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unlora.cli.compose import composed
from unlora.config.audit_config import AuditConfig, read_audit
from unlora.results.audit_log import FILE, FOLDER, SCORES
from unlora.runs.run import set_aside
from unlora.runs.safe_loading import read_json
from unlora.studies.config import Study
from unlora.studies.stages import Stage, evaluation

DIALLED = "-dialled"
PLAIN = {"plain": {"handler": "plain"}}
OF_AUDIT = {"data", "output_dir", "thresholds"}  # keys of its config that a stage may set


def with_audits(study: Study, stages: Sequence[Stage]) -> list[Stage]:
    """The stages of a study, with audits and dialled methods where it asks for them."""
    evaluations = {stage.name: stage for stage in stages if stage.kind == "eval"}
    all_stages = [*stages]
    for stage in stages:
        is_audited = study.audit is not None or study.dial is not None
        wanted = is_audited and stage.seed in study.seeds[: study.audit_seeds]
        if not wanted or (stage.kind, stage.role) != ("train", "method"):
            continue
        needs = evaluations[stage.name.removesuffix("train") + "eval"].needs
        roles = {evaluations[n].role: evaluations[n] for n in needs if n in evaluations}
        all_stages += _of_method(study, stage, roles["target"], roles.get("gold"))
    return all_stages


def _of_method(study: Study, trained: Stage, target: Stage, gold: Stage | None) -> Iterator[Stage]:
    """The audit of a method, and the method dialled, with its evaluation and its audit."""
    attack = _attack(study, trained, target, gold)
    if study.audit is not None:
        yield attack
    if study.dial is not None:
        dialled = Stage(
            "dial", trained.run + DIALLED, "method", trained.seed, trained.folder + DIALLED,
            "unlearn", (), {"to": study.dial, **_compared(study, target, gold)},
            model=trained.folder,
            needs=_needs(trained if study.audit is None else attack, target, gold),
        )  # fmt: skip
        yield dialled
        yield evaluation(study, dialled, gold, target)
        if study.audit is not None:
            yield _attack(study, dialled, target, gold)


def _attack(study: Study, of: Stage, target: Stage, gold: Stage | None) -> Stage:
    return Stage(
        "audit", of.run, "method", of.seed, of.folder, "unlearn", (),
        _compared(study, target, gold), model=of.folder, needs=_needs(of, target, gold),
    )  # fmt: skip


def _compared(study: Study, target: Stage, gold: Stage | None) -> dict[str, Any]:
    """The words of an audit's config."""
    return {"audit": study.audit, "target": target.model,
            "retain_model": gold.model if gold else None}  # fmt: skip


def _needs(of: Stage, target: Stage, gold: Stage | None) -> tuple[str, ...]:
    compared = [stage for stage in (target, gold) if stage]
    return (*dict.fromkeys((of.name, *(need for stage in compared for need in stage.needs))),)


def config_of(stage: Stage) -> AuditConfig:
    """What the stage does, as ``unlora audit`` would be told."""
    cfg = composed("audit", ["audit=none"])
    cfg.run, cfg.target = stage.model, stage.params["target"]
    cfg.retain_model, cfg.output = stage.params["retain_model"], "quiet"
    cfg.audit = dict(stage.params["audit"] or PLAIN)
    for name in OF_AUDIT & stage.params.keys():
        cfg[name] = stage.params[name]
    return read_audit(cfg)


def rows_of(stage: Stage) -> tuple[dict[str, Any], str | None]:
    """The suites and data of the run that is audited, and where data sets are."""
    config = read_json(Path(str(stage.model)) / "run_config.json")
    datasets_dir = (config.get("paths") or {}).get("datasets_dir")
    return {key: config.get(key) or {} for key in ("eval", "data")}, datasets_dir


def run(stage: Stage) -> None:
    """Audit or dial in this process."""
    from unlora.recipes import audit, dial_run

    config = config_of(stage)
    if stage.kind == "audit":
        audit.run(config)
        return
    if Path(stage.folder).is_dir():
        set_aside(Path(stage.folder))
    otherwise = stage.params.get("otherwise", "plain")
    dial_run.run(config, stage.params["to"], stage.folder, otherwise=otherwise)


def outputs(stage: Stage) -> Iterator[Path]:
    """What an audit has left."""
    for name in (FILE, SCORES):
        if (file := Path(stage.folder, FOLDER, name)).is_file():
            yield file
