"""Measure what a served form of a model still knows, and refuse it where that changed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from unlora.audits.attack import mean_logps
from unlora.audits.scores import probability
from unlora.config.audit_config import AuditConfig
from unlora.errors import InputError
from unlora.evals.eval_model import LazyModel
from unlora.recipes.audit import runner_for
from unlora.recipes.audited_run import find_run
from unlora.results.audit_log import AuditLog, read_audit
from unlora.results.collapse import CollapseRule

MOST_RECALLED = 0.02  # rise of the mean probability of the forget answers
MOST_LOST = 0.05  # fall of that of the retain answers
SAME_ROWS = 0.05  # nats: an audit that has other figures of the same model was of other rows


@dataclass(frozen=True)
class Figures:
    """What a model says of the rows of a run; None where the run has no such rows.

    Attributes:
        forget, retain: mean probability of the answers.
        score: mean log-probability of a token of the forget answers.
        spoken: numbers of the forget rows whose answer is the likeliest text, token by token.
    """

    forget: float | None = None
    retain: float | None = None
    score: float | None = None
    spoken: frozenset[int] = frozenset()

    @property
    def is_known(self) -> bool:
        """Whether forget rows could be scored."""
        return self.forget is not None and not math.isnan(self.forget)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        spoken = None if self.forget is None else len(self.spoken)
        return {"forget": self.forget, "retain": self.retain, "answers_given": spoken}


class ServeGuard:
    """Compare forms of a run's model by its forget and retain rows, where they are there.

    Attributes:
        why_no_rows: where they are not.
        audit: of the run; None where it was not audited.
    """

    def __init__(self, run: str, config: AuditConfig) -> None:
        self.audit: AuditLog | None = read_audit(run)
        self.why_no_rows: str | None = None
        try:
            audited_run = find_run(config)
        except InputError as error:
            self.why_no_rows = str(error)
            return
        self.data, self.runner = audited_run.data, runner_for(config, audited_run)

    def measure(self, network: nn.Module) -> Figures:
        """Ask a network about the rows."""
        if self.why_no_rows is not None:
            return Figures()
        lazy = LazyModel(lambda: network, None)
        records = self.runner.records(lazy, self.data.forget)
        spoken = (n for n, record in enumerate(records) if len(record.hit) and record.hit.all())
        retain = None
        if self.data.retain is not None:
            retain = probability(mean_logps(self.runner.records(lazy, self.data.retain)))
        logps = mean_logps(records)
        return Figures(probability(logps), retain, float(np.nanmean(logps)), frozenset(spoken))

    def why_refused(self, before: Figures, after: Figures) -> str | None:
        """Why a form is not to be served: half a sentence, None where it is as it was."""
        if not before.is_known or before.forget is None or after.forget is None:
            return None
        if new := after.spoken - before.spoken:
            return f"it gives the answers of {len(new)} forget rows word for word, and did not"
        retain = before.retain, after.retain
        if None not in retain and not after.retain >= before.retain - MOST_LOST:  # type: ignore[operator]
            return "the retain answers fall from {:.3f} to {:.3f}".format(*retain)
        if why := self._other_verdict(before, after):
            return why
        if not after.forget <= before.forget + MOST_RECALLED:
            return f"the forget answers rise from {before.forget:.3f} to {after.forget:.3f}"
        return None

    def _other_verdict(self, before: Figures, after: Figures) -> str | None:
        """Why the verdict of the audit would be another, by what the model says plainly."""
        plain = self.audit and self.audit.plain
        means: Mapping[str, float | None] = (plain or {}).get("means") or {}
        if self.audit is None or before.score is None or after.score is None:
            return None
        unlearned, target, retain = (means.get(x) for x in ("unlearned", "target", "retain"))
        if unlearned is None or target is None or retain is None or target == retain:
            return None
        if not abs(unlearned - before.score) <= SAME_ROWS:
            return None
        was, now = ((x - retain) / (target - retain) for x in (before.score, after.score))
        verdict = self._verdict(was, now, after.retain)
        if verdict is None or verdict == self.audit.verdict:
            return None
        return (
            f"the verdict {self.audit.verdict!r} would be {verdict!r} (plain residual {was:.2f} "
            f"-> {now:.2f})"
        )

    def _verdict(self, was: float, now: float, retain: float | None) -> str | None:
        """What the plain residual tells of the verdict; None where it tells nothing new.

        Args:
            retain: probability of the retain answers.
        """
        assert self.audit is not None
        content, limits = self.audit.content, self.audit.content["thresholds"]
        target = (content.get("retain_probability") or {}).get("target")
        rule = CollapseRule(utility_floor=0.0)
        if retain is not None and target and rule.judge(retain, math.nan, target).reasons:
            return "broken"
        if self.audit.verdict not in ("held", "hidden"):
            return None
        _, bound = (self.audit.held or {}).get("interval95") or (0.0, 0.0)
        if now > limits["known"]:
            return "known"
        if now < limits["over_forgotten"] <= was:
            return "over-forgotten"
        # attacks bring back as much more as is there plainly
        return "hidden" if bound + now - was > limits["hidden"] >= bound else None
