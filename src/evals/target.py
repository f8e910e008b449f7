"""Check that the target knows what it is to forget, before any figure of forgetting is given."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from unlora.data.chat_encoding import Encoded
from unlora.evals.passes import score
from unlora.forward import IGNORE_INDEX
from unlora.results.baseline_log import BaselineLog
from unlora.results.target_check import FORGET_FIGURES, TRAIN_FURTHER, hardly_knows, told_apart
from unlora.results.value import Value

MOST_ROWS = 64  # of the forget data, at even distances
PROBABILITY = "forget_Q_A_Prob"
logger = logging.getLogger(__name__)


def doubt(kind: str, target: Mapping[str, Value], retain: BaselineLog) -> str | None:
    """Why no figure of the way from target to retain model means anything, where that is so.

    Args:
        target: the target's values of the metrics in :data:`FORGET_FIGURES`.
        retain: the log of the retain model.
    """
    pairs = {name: (target[name], retain.value(name)) for name in FORGET_FIGURES[kind]
             if name in target}  # fmt: skip
    known = {name: pair for name, pair in pairs.items() if not any(v.not_computed for v in pair)}
    if not known or any(_apart(*pair) for pair in known.values()):
        return None
    figures = [
        f"{name}: target {_shown(t)}, retain model {_shown(r)}" for name, (t, r) in known.items()
    ]
    return (
        f"Target and retain model do not differ in what was to be forgotten ({figures[0]}), so no "
        f"figure of the way between them means anything. {TRAIN_FURTHER}."
    )


def retain_probability(suites: Sequence[Any]) -> Value | None:
    """The retain model's probability of the forget answers, by the log of a suite that has one."""
    logs = [suite.logs["reference"] for suite in suites if hasattr(suite, "logs")]
    values = [log.value(PROBABILITY) for log in logs if log.file]
    return next((value for value in values if not value.not_computed), None)


class TargetCheck(TrainerCallback):
    """Warn before the first step if the target hardly knows the rows that it is to forget.

    Args:
        rows: the forget data; running text, which has no prompt, is left alone.
        retain: the retain model's probability of the forget answers, where it is known.
    """

    def __init__(
        self, rows: Sequence[Encoded], pad_id: int, end_id: int | None, retain: Value | None
    ) -> None:
        answers = [row for row in rows if row.labels[:1] == [IGNORE_INDEX]]
        step = max(1, len(answers) // MOST_ROWS)
        self.rows, self.retain = answers[::step][:MOST_ROWS], retain
        self.pad_id, self.end_id = pad_id, end_id

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        if state.global_step or not self.rows:
            return
        answers = score(
            model, self.rows, [""] * len(self.rows), pad_id=self.pad_id, end_id=self.end_id
        )
        answers = [answer for answer in answers if len(answer.logp)]
        mean = Value.mean_of(np.exp([-answer.loss for answer in answers]), [])
        by_heart = [bool(answer.without_end().hit.all()) for answer in answers]
        if warning := _hardly_known(mean, by_heart, self.retain):
            logger.warning("%s", warning)


def _hardly_known(mean: Value, by_heart: Sequence[bool], retain: Value | None) -> str | None:
    """Why a target can hardly be made to forget its rows, where that is so."""
    if retain is not None:
        if _apart(mean, retain):
            return None
        beside = f", and a model that never saw them {_shown(retain)}"
    elif not hardly_knows(mean.value, by_heart):
        return None
    else:
        beside = ""
    return (
        f"The model hardly knows what it is to forget: it gives {len(by_heart)} forget answers a "
        f"probability of {_shown(mean)} per token ({sum(by_heart)} by heart){beside}. No figure "
        f"of forgetting will mean much. {TRAIN_FURTHER}."
    )


def _apart(target: Value, retain: Value) -> bool:
    return told_apart(target.value, retain.value, target.interval, retain.interval)


def _shown(value: Value) -> str:
    bounds = "" if value.interval is None else " [{:.3f}, {:.3f}]".format(*value.interval)
    return f"{value.value:.3f}{bounds}"
