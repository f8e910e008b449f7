"""Register metrics: pure functions from records to a ``Value``, without model, tokenizer or path.

One file per idea. The signature is the declaration:

* *positional* parameters are the inputs, and their type says where they come from
  (a pass of :mod:`unlora.evals.passes`, or one of ``OTHER_INPUTS``);
* *keyword-only* parameters are the settings that a config may change.

A metric says its range, which end is better, and what it does with nothing to score.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, get_args

from unlora.evals.passes.declaration import record_kinds
from unlora.evals.records import Reference, Target
from unlora.registry import Registry
from unlora.results.value import Value

# beside the records of the passes
OTHER_INPUTS: dict[Any, str] = {
    Value: "metric",  # another metric of the suite
    list[Value]: "metrics",  # several of them
    Reference: "reference",  # a metric in the log of the retain model
    Target: "target",  # a metric in the log of the model before unlearning
}


@dataclass(frozen=True)
class Metric:
    """A metric and what it declares by its signature.

    Attributes:
        inputs: name of an input -> where it comes from, see ``OTHER_INPUTS`` and
            :func:`unlora.evals.passes.declaration.record_kinds`.
        optional: the inputs that may be None (``X | None``): the metric does without.
        settings: name -> default; the signature says what else is allowed.
        higher_is_better: None where the best value is neither end of the range.
    """

    name: str
    fn: Callable[..., Value]
    inputs: Mapping[str, str]
    optional: frozenset[str]
    settings: Mapping[str, Any]
    higher_is_better: bool | None


METRICS: Registry[Metric] = Registry("metric handler", __name__)


def metric(
    name: str, *, higher_is_better: bool | None
) -> Callable[[Callable[..., Value]], Callable[..., Value]]:
    """Register a metric under the name that configs use as its ``handler``."""

    def register(fn: Callable[..., Value]) -> Callable[..., Value]:
        parameters = inspect.signature(fn, eval_str=True).parameters.values()
        slots = {p.name: p.annotation for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
        optional = {name for name, kind in slots.items() if NoneType in get_args(kind)}
        kinds = record_kinds() | OTHER_INPUTS
        types = {n: get_args(kind)[0] if n in optional else kind for n, kind in slots.items()}
        for parameter, type_ in types.items():
            if type_ not in kinds:
                known = ", ".join(sorted(getattr(k, "__name__", str(k)) for k in kinds))
                raise TypeError(
                    f"metric {name!r} ({fn.__module__}): parameter {parameter} is {type_!r}, which "
                    f"no pass gives and no log holds. Known: {known}."
                )
        inputs = {parameter: kinds[type_] for parameter, type_ in types.items()}
        settings = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        METRICS.add(name, Metric(name, fn, inputs, frozenset(optional), settings, higher_is_better))
        return fn

    return register
