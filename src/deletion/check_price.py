"""Estimate what dialling and attacking cost, in passes of one row of a training.

The shares were measured on the embedded benchmark, on a CPU. Loading models is not counted.
"""

from collections.abc import Mapping
from typing import Any

FORWARD = 0.6  # of a pass forward and backward: a row that is scored, with its share of overhead
SAMPLED = 1.2  # an answer that is drawn
RELEARNT = 1.6  # a row of a step of a short training
MODELS = 3  # unlearned model, target, retain model
WORDINGS, LAYERS = 7, 8
SCALES = {"none": 0, "plain": 12, "audit": 12}  # at which rows are scored
AUDITS = {"none": 0, "plain": 0, "audit": 3}  # of the unlearned model alone


def checking_rows(
    attacks: Mapping[str, Mapping[str, Any] | None], dial: str, forget: int, others: int
) -> float:
    """So many rows of training cost as much as the dial and the audit.

    Args:
        attacks: name -> section of the config.
        forget, others: rows that are asked about.
    """
    sections = [section for section in attacks.values() if section]
    attacked = sum(_of_attack(section, forget) for section in sections)
    plain = (forget + others) * FORWARD
    return MODELS * (plain + attacked) + SCALES[dial] * plain + AUDITS[dial] * attacked


def _of_attack(section: Mapping[str, Any], forget: int) -> float:
    handler = section.get("handler")
    if handler == "sample":
        return float(section.get("samples", 32) * forget * SAMPLED)
    if handler == "relearn":
        rates, steps = section.get("learning_rates", (1, 2, 3)), section.get("steps", (60,))
        trained = len(rates) * max(steps) * section.get("batch_size", 8)
        return float(trained * RELEARNT)
    if handler == "scale":
        return forget * FORWARD / MODELS  # of the unlearned model alone
    times = {"wordings": WORDINGS, "depth": LAYERS}.get(str(handler), 1)
    return times * forget * FORWARD
