"""Answer a deletion request: plan it, run its stages, write its evidence.

unlora forget rows.jsonl --model saves/finetune/full
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from unlora.deletion.earlier import EVIDENCE, MODELS
from unlora.deletion.evidence import FILE, PAGE, read_json, write_evidence
from unlora.deletion.plan import Order, as_text, plan
from unlora.deletion.stages import stages_of
from unlora.errors import InputError
from unlora.evals.progress import without_library_bars
from unlora.runs.run import alone, full_disk_in_words, make_writable
from unlora.studies import scheduler
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
    print(as_text(planned))
    evidence, home = EVIDENCE / planned.name, MODELS / planned.name
    if (evidence / FILE).is_file():
        raise InputError(
            f"The request {planned.name} is answered: {evidence / PAGE}. Check it with: unlora "
            f"verify {evidence}. For another request, give another --id."
        )
    if dry_run:
        print("Nothing was trained: --dry-run.")
        return None
    make_writable(home, "folder of the request", "Give another --id, and")
    print(f"request {planned.name}")
    with alone(home), full_disk_in_words(home), without_library_bars():
        stages = stages_of(planned, home)
        logging.getLogger().setLevel(logging.WARNING)
        done = scheduler.run(stages, home, _in_turn)
        if done.failed:
            failed = [f"{name}: {why}" for name, why in done.failed.items()]
            failed.append(f"The logs are in {home / 'stages'}. The same command goes on from here.")
            raise InputError("\n".join(failed))
        write_evidence(planned, stages, home, evidence)
    _say(evidence)
    return evidence


def _in_turn(stages: Sequence[tuple[Stage, Record]]) -> list[str | None]:
    """Do stages in this process, one after another."""
    return [do(stage, record) for stage, record in stages]


def _say(evidence: Path) -> None:
    entries = read_json(evidence / FILE)["entries"]
    facts = {one["kind"]: one["content"] for one in entries}
    print(f"\n{facts['audit']['verdict']['sentence']}")
    for one in facts["earlier"]:
        left = f"{100 * (one['residual'] or 0):.0f} % of what was known of its rows is there"
        print(f"earlier request {one['id']}: {'CAME BACK: ' if one['came_back'] else ''}{left}")
    print(f"The model: {facts['model']['path']}")
    print(f"The evidence: {evidence / PAGE}")
    print(f"Its hash, to be kept elsewhere: {entries[-1]['sha256']}")
