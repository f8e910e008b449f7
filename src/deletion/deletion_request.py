"""Answer a deletion request: plan it, run its stages, write its evidence.

unlora forget rows.jsonl --model saves/finetune/full
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from unlora.config import read
from unlora.deletion.earlier import EVIDENCE, MODELS, read_facts
from unlora.deletion.evidence import write_evidence
from unlora.deletion.evidence_chain import FILE, PAGE
from unlora.deletion.order import Order
from unlora.deletion.page import percent
from unlora.deletion.plan import as_text, plan
from unlora.deletion.request_stages import stages_of
from unlora.errors import InputError
from unlora.evals.progress import without_library_bars
from unlora.recipes.audit import attacks_of, thresholds_of
from unlora.runs.run import FULL, alone, full_disk_in_words, make_writable
from unlora.runs.safe_loading import read_json
from unlora.studies import audit_stages, scheduler
from unlora.studies.dry_run import in_time
from unlora.studies.stage_fingerprints import config_of
from unlora.studies.stage_run import Record, do
from unlora.studies.stages import Stage


def run(order: Order, *, dry_run: bool = False) -> Path | None:
    """Do what a user asks for; what was done before it was stopped is not done again.

    Returns:
        The folder of the evidence; None for a dry run.

    Raises:
        InputError: something in the request, the model or the data can be put right, or a stage
            failed; what is finished is kept.
    """
    planned = plan(order)
    evidence, home = EVIDENCE / planned.name, MODELS / planned.name
    _refuse_answered(evidence)
    stages = stages_of(planned, home)
    _check(stages)
    print(as_text(planned))
    if dry_run:
        print("Nothing was trained: --dry-run.")
        return None
    make_writable(home, "folder of the request", "Give another --id, and")
    print(f"request {planned.name}")
    with alone(home), full_disk_in_words(home), without_library_bars():
        logging.getLogger().setLevel(logging.WARNING)
        done = scheduler.run(stages, home, _in_turn)
        if done.failed:
            raise InputError(_why_stopped(done.failed, home))
        write_evidence(planned, stages, home, evidence)
    _say(evidence)
    held = read_facts(evidence)["audit"]["verdict"]["name"] in ("exact", "held")
    if not held and not isinstance(planned.exact, str):
        time = in_time(planned.exact.seconds) if planned.exact.seconds else "as long as its runs"
        print(f"That it holds is not shown. An exact answer would take about {time}: --route exact")
    return evidence


def _refuse_answered(evidence: Path) -> None:
    if not (evidence / FILE).is_file():
        return
    undone = "rolled back" in read_facts(evidence)
    raise InputError(
        f"The request {evidence.name} is {'rolled back' if undone else 'answered'}: "
        f"{evidence / PAGE}. For another request, give another --id."
    )


def _check(stages: Sequence[Stage]) -> None:
    """Raise InputError for what a config of a stage has wrong, before anything is trained."""
    for stage in stages:
        if stage.kind == "train":
            read(config_of(stage))
        else:
            config = audit_stages.config_of(stage)
            attacks_of(config), thresholds_of(config)


def _in_turn(stages: Sequence[tuple[Stage, Record]]) -> list[str | None]:
    """Do stages in this process, one after another."""
    return [do(stage, record) for stage, record in stages]


def _why_stopped(failed: Mapping[str, str], home: Path) -> str:
    for why in failed.values():
        if why.startswith(FULL):
            return f"{why.rpartition('; ')[0]}: it goes on from here."
    logs = f"The logs are in {home / 'stages'}. The same command goes on from here."
    return "\n".join([*(f"{name}: {why}" for name, why in failed.items()), logs])


def _say(evidence: Path) -> None:
    entries = read_json(evidence / FILE)["entries"]
    facts = read_facts(evidence)
    print(f"\n{facts['audit']['verdict']['sentence']}")
    for request in facts["earlier"]:
        back = "CAME BACK: " if request["came_back"] else ""
        left = f"{percent(request['residual'])} of what was known of its rows is there"
        print(f"earlier request {request['id']}: {back}{left}")
    print(f"The model: {facts['model']['path']}")
    print(f"The evidence: {evidence / PAGE}")
    print(f"Its hash, to be kept elsewhere: {entries[-1]['sha256']}")
