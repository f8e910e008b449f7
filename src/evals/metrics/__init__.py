"""Metrics: pure functions from records to a ``Value``. They hold no model, tokenizer or path.

One file per idea. The signature is the declaration:

* *positional* parameters are the inputs, and their type says where they come from (``SOURCES``);
* *keyword-only* parameters are the settings that a config may change.

A metric says its range, which end is better, and what it does with nothing to score.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from unlora.evals.records import Generated, Reference, Scored, Value
from unlora.registry import Registry

SOURCES = {
    list[Scored]: "score",  # the pass that scores one answer per example
    list[list[Scored]]: "score_each",  # the same, several answers per example
    list[Generated]: "generate",  # greedy generation
    Value: "metric",  # another metric of the suite
    list[Value]: "metrics",  # several of them
    Reference: "reference",  # a metric in the log of the retain model
}


@dataclass(frozen=True)
class Metric:
    """A metric and what it declares by its signature.

    Attributes:
        inputs: name of an input -> where it comes from, a value of ``SOURCES``.
        settings: name -> its type; a ``Literal`` lists what is allowed.
        higher_is_better: None where the best value is neither end of the range.
    """

    name: str
    fn: Callable[..., Value]
    inputs: Mapping[str, str]
    settings: Mapping[str, Any]
    higher_is_better: bool | None


METRICS: Registry[Metric] = Registry("metric handler", __name__)


def metric(
    name: str, *, higher_is_better: bool | None
) -> Callable[[Callable[..., Value]], Callable[..., Value]]:
    """Register a metric under the name that configs use as its ``handler``."""

    def register(fn: Callable[..., Value]) -> Callable[..., Value]:
        parameters = inspect.signature(fn).parameters.values()
        inputs = {
            p.name: SOURCES[p.annotation] for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD
        }
        settings = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
        METRICS.add(name, Metric(name, fn, inputs, settings, higher_is_better))
        return fn

    return register
