"""Keep the scores of an audit, and judge them again without a model."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unlora.audits.residual import (
    Comparison,
    Held,
    Residual,
    Scores,
    draws_of,
    held,
    residual,
)
from unlora.audits.traces import recognisable
from unlora.audits.verdict import Thresholds, Verdict, judge
from unlora.results.collapse import CollapseRule
from unlora.results.value import Value

ROLES = ("unlearned", "target", "retain")


@dataclass(frozen=True)
class AuditScores:
    """What the models said, one number a row: all that verdict and figures are computed from.

    Attributes:
        comparisons: every form of every attack, the plain question first.
        logps: part of the data -> role -> mean log-probability of each answer, plainly asked.
        collapsed: by what the evaluation of the unlearned model calls it broken.
    """

    comparisons: Sequence[Comparison]
    logps: Mapping[str, Mapping[str, Scores]]
    collapsed: Sequence[str] = ()

    def as_json(self) -> dict[str, Any]:
        """For a file; a row without a score is null there."""
        forms = [
            {"name": form.name, "attack": form.attack, "counts": form.counts}
            | {role: _numbers(getattr(form, role)) for role in ROLES}
            for form in self.comparisons
        ]
        logps = {
            part: {role: _numbers(scores) for role, scores in models.items()}
            for part, models in self.logps.items()
        }
        return {"attacks": forms, "logps": logps, "collapsed": list(self.collapsed)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "AuditScores":
        """What :meth:`as_json` wrote."""
        forms = []
        for form in content["attacks"]:
            rows = {role: _scores(form[role]) for role in ROLES}
            forms.append(Comparison(form["name"], form["attack"], **rows, counts=form["counts"]))
        logps = {
            part: {role: _scores(numbers) for role, numbers in models.items()}
            for part, models in content["logps"].items()
        }
        return cls(forms, logps, content["collapsed"])


def judged(scores: AuditScores, thresholds: Thresholds, baseline: str) -> dict[str, Any]:
    """The verdict with the figures that it rests on, as ``AUDIT.json`` has them."""
    draws = draws_of(len(scores.comparisons[0].unlearned))
    residuals = [residual(comparison, draws) for comparison in scores.comparisons]
    largest = held(scores.comparisons, draws)
    share = _recognisable(scores)
    plain = next(form for form in residuals if form.attack == "plain")
    utility = {role: probability(logps) for role, logps in scores.logps["retain"].items()}
    reasons = list(scores.collapsed) or _broken(utility, scores)
    verdict = judge(plain, largest, reasons, share, thresholds, baseline)
    return {
        **_as_content(verdict, largest, residuals),
        "retain_probability": utility,
        "recognisable": value_content(share),
    }


def probability(logps: Scores) -> float:
    """Mean over rows of the geometric mean of the tokens' probabilities."""
    return float(np.nanmean(np.exp(logps)))


def value_content(value: Value | None) -> dict[str, Any] | None:
    """A value and its interval, for JSON."""
    return None if value is None else {"value": value.value, "interval95": value.interval}


def _broken(utility: Mapping[str, float], scores: AuditScores) -> list[str]:
    """By what the retain rows show the model to be broken."""
    if not utility:
        return []
    before = utility["target"]
    rows = 0 if math.isnan(before) else len(scores.logps["retain"]["unlearned"])
    rule = CollapseRule(utility_floor=0.0)
    reasons = rule.judge(utility["unlearned"], float("nan"), before, rows).reasons
    return [f"of the retain rows, {reason}" for reason in reasons]


def _recognisable(scores: AuditScores) -> Value | None:
    if not scores.logps["holdout"]:
        return None
    roles = ("unlearned", "retain")
    forget, holdout = (
        [scores.logps[part][role] for role in roles] for part in ("forget", "holdout")
    )
    return recognisable(*forget, *holdout)


def _as_content(
    verdict: Verdict, largest: Held | None, residuals: Sequence[Residual]
) -> dict[str, Any]:
    forms = []
    for form in residuals:
        entry = dataclasses.asdict(form)
        entry["residual"], entry["interval95"] = entry.pop("value"), entry.pop("interval")
        entry["means"] = dict(zip(ROLES, form.means, strict=True))
        forms.append(entry)
    content = None if largest is None else dataclasses.asdict(largest)
    if content is not None:
        content["interval95"] = content.pop("interval")
    return {"verdict": dataclasses.asdict(verdict), "held": content, "attacks": forms}


def _numbers(scores: Scores) -> list[float | None]:
    return [float(score) if np.isfinite(score) else None for score in scores]


def _scores(numbers: Sequence[float | None]) -> Scores:
    return np.array(numbers, dtype=np.float64)
