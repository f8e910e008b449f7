"""Turn the metrics of a suite into the fewest questions to the model, then answer the metrics."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from unlora.errors import InputError
from unlora.evals.metrics import METRICS, Metric
from unlora.evals.records import Value
from unlora.registry import unknown

PASSES = {"score": "score", "score_each": "score", "generate": "generate"}


@dataclass(frozen=True)
class Request:
    """One metric of a suite: which metric, on which data, with which settings.

    Attributes:
        name: how the result is called in the log.
        handler: a name in ``METRICS``.
        inputs: input of the metric -> the data set, or the other request(s), it comes from.
        settings: keyword arguments for the metric.
    """

    name: str
    handler: str
    inputs: Mapping[str, str | Sequence[str]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    higher_is_better: bool | None = None

    @property
    def metric(self) -> Metric:
        return METRICS[self.handler]

    def sources(self) -> list[tuple[str, str]]:
        """(where from, name) of every input, in the order of the metric's parameters."""
        pairs = []
        for slot, kind in self.metric.inputs.items():
            given = self.inputs[slot]
            pairs += [(kind, given)] if isinstance(given, str) else [(kind, one) for one in given]
        return pairs


def read_request(name: str, config: Mapping[str, Any]) -> Request:
    """One metric as a config gives it: ``handler``, ``inputs``, and settings beside them.

    Raises:
        InputError: no such handler, input or setting.
    """
    settings = dict(config)
    handler = settings.pop("handler", None)
    if handler not in METRICS:
        raise InputError(f"Metric {name}: {unknown('handler', handler, METRICS)}")
    metric = METRICS[handler]
    inputs = dict(settings.pop("inputs", None) or {})
    direction = settings.pop("higher_is_better", metric.higher_is_better)
    for slot in inputs:
        if slot not in metric.inputs:
            raise InputError(
                f"Metric {name}: {unknown(f'input of {handler}', slot, metric.inputs)}"
            )
    for slot, kind in metric.inputs.items():
        if slot not in inputs:
            raise InputError(f"Metric {name}: {handler} needs the input {slot!r} ({kind}).")
        if isinstance(inputs[slot], str) == (kind == "metrics"):
            wanted = "a list of names" if kind == "metrics" else "one name"
            raise InputError(f"Metric {name}: the input {slot!r} must be {wanted}.")
    for key, value in settings.items():
        if key not in metric.settings:
            known = unknown(f"setting of {handler}", key, metric.settings)
            raise InputError(f"Metric {name}: {known}")
        allowed = get_args(metric.settings[key])
        if allowed and value not in allowed:
            raise InputError(f"Metric {name}: {unknown(key, value, allowed)}")
        if metric.settings[key] is float and not isinstance(value, (int, float)):
            raise InputError(f"Metric {name}: {key} is {value!r}; it must be a number.")
    return Request(name, handler, inputs, settings, direction)


def needed(requests: Iterable[Request], names: Iterable[str]) -> list[Request]:
    """The named requests and all they need, each after what it needs.

    Raises:
        InputError: a request that is needed does not exist, or needs itself.
    """
    known = {request.name: request for request in requests}
    ordered: dict[str, Request] = {}

    def add(name: str, above: tuple[str, ...]) -> None:
        if name in ordered:
            return
        if name in above:
            raise InputError(f"Metric {name} needs itself: {' -> '.join((*above, name))}.")
        if name not in known:
            whom = f"Metric {above[-1]} needs another metric: " if above else ""
            raise InputError(whom + unknown("metric", name, known))
        for kind, source in known[name].sources():
            if kind in ("metric", "metrics"):
                add(source, (*above, name))
        ordered[name] = known[name]

    for name in names:
        add(name, ())
    return list(ordered.values())


def questions(requests: Iterable[Request]) -> list[tuple[str, str]]:
    """The (pass, data) pairs that must be run, each once, however many metrics use it."""
    return sorted(
        {
            (PASSES[kind], source)
            for request in requests
            for kind, source in request.sources()
            if kind in PASSES
        }
    )


def not_computable(
    requests: Sequence[Request],
    reference: Callable[[str], Value],
    missing: Mapping[str, str],
) -> dict[str, str]:
    """Requests that cannot be computed, whatever the model says -> why.

    Args:
        requests: each after what it needs.
    """
    reasons: dict[str, str] = {}
    for request in requests:
        for kind, source in request.sources():
            known = missing if kind in PASSES else reasons
            why = reference(source).not_computed if kind == "reference" else known.get(source)
            if why:
                reasons.setdefault(request.name, why)
    return reasons


def evaluate(
    requests: Sequence[Request],
    run: Callable[[str, str], Any],
    reference: Callable[[str], Value],
    missing: Mapping[str, str] | None = None,
) -> dict[str, Value]:
    """Compute the requests, which come each after what it needs.

    Args:
        run: questions the model: (pass, data) -> records. Called once for each question.
        reference: name of a metric -> its value for the retain model.
        missing: data that are not there -> why; what needs them is not computed, and says why.
    """
    missing = missing or {}
    reasons = not_computable(requests, reference, missing)
    asked = [question for question in questions(requests) if question[1] not in missing]
    answers = {question: run(*question) for question in asked}
    values: dict[str, Value] = {}

    def get(kind: str, source: str) -> Any:
        if kind == "reference":
            return reference(source)
        if kind in ("metric", "metrics"):
            return values[source]
        return answers[PASSES[kind], source]

    for request in requests:
        if request.name in reasons:
            values[request.name] = Value.missing(reasons[request.name])
            continue
        found = [get(kind, source) for kind, source in request.sources()]
        if "metrics" in request.metric.inputs.values():
            values[request.name] = request.metric.fn(found, **request.settings)
        else:
            values[request.name] = request.metric.fn(*found, **request.settings)
    return values
