"""Turn the metrics of a suite into the fewest questions to the model, then answer the metrics."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unlora.errors import InputError
from unlora.evals.metrics import METRICS, Metric
from unlora.evals.passes.declaration import PASSES, pass_of
from unlora.registry import check_settings, unknown
from unlora.results.value import Value

LOGS = ("reference", "target")  # inputs that stand in a log, not in this evaluation
Question = tuple[str, str]
Why = Callable[[str, str], str | None]


@dataclass(frozen=True)
class Request:
    """One metric of a suite: which metric, on which data, with which settings.

    Attributes:
        name: how the result is called in the log.
        handler: a name in ``METRICS``.
        inputs: input of the metric -> the data set, or the other request(s), it comes from;
            optional ones may be left out.
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
        """(where from, name) of every input that is given, in the order of the parameters."""
        pairs = []
        for slot, kind in self.metric.inputs.items():
            value = self.inputs.get(slot)
            names = [value] if isinstance(value, str) else value or ()
            pairs += [(kind, name) for name in names]
        return pairs


def read_request(name: str, config: Mapping[str, Any]) -> Request:
    """One metric as a config gives it: ``handler``, ``inputs``, and settings beside them.

    Raises:
        InputError: no such handler, input or setting.
    """
    if not isinstance(config, Mapping):
        raise InputError(
            f"Metric {name} is {config!r}; it must be a section with handler and inputs."
        )
    settings = dict(config)
    handler = settings.pop("handler", None)
    if handler not in METRICS:
        raise InputError(f"Metric {name}: {unknown('handler', handler, METRICS)}")
    metric = METRICS[handler]
    inputs = settings.pop("inputs", None) or {}
    if not isinstance(inputs, Mapping):
        raise InputError(f"Metric {name}: inputs is {inputs!r}; it must be a section with keys.")
    inputs = dict(inputs)
    direction = settings.pop("higher_is_better", metric.higher_is_better)
    if direction not in (True, False, None):
        raise InputError(
            f"Metric {name}: higher_is_better is {direction!r}; it must be true or false."
        )
    for slot in inputs:
        if slot not in metric.inputs:
            raise InputError(
                f"Metric {name}: {unknown(f'input of {handler}', slot, metric.inputs)}"
            )
    for slot, kind in metric.inputs.items():
        if slot not in inputs:
            if slot in metric.optional:
                continue
            raise InputError(f"Metric {name}: {handler} needs the input {slot!r} ({kind}).")
        if isinstance(inputs[slot], str) == (kind == "metrics"):
            wanted = "a list of names" if kind == "metrics" else "one name"
            raise InputError(f"Metric {name}: the input {slot!r} must be {wanted}.")
    try:
        check_settings(handler, metric.settings, settings, declared=metric.fn)
    except InputError as error:
        raise InputError(f"Metric {name}: {error}") from error
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


def questions(requests: Iterable[Request]) -> list[Question]:
    """The (pass, data) pairs that must be run, each once, in an order in which they can be run."""
    pairs = {
        (asked_pass.name, source)
        for request in requests
        for kind, source in request.sources()
        if (asked_pass := pass_of(kind))
    }
    pairs |= {(after, source) for name, source in pairs if (after := PASSES[name].after)}
    return sorted(pairs, key=lambda question: (PASSES[question[0]].order, question[1]))


def not_computable(
    requests: Sequence[Request],
    log: Callable[[str, str], Value],
    missing: Why = lambda pass_name, data: None,
) -> dict[str, str]:
    """Requests that cannot be computed, whatever the model says -> why.

    Args:
        requests: each after what it needs.
        log: ("reference" or "target", name of a metric) -> its value there.
        missing: (pass, data) -> why it cannot be run, where that is so.
    """
    reasons: dict[str, str] = {}
    for request in requests:
        for slot, kind in request.metric.inputs.items():
            names = request.inputs.get(slot)
            for source in [names] if isinstance(names, str) else names or ():
                if kind in LOGS:
                    why = log(kind, source).not_computed
                elif asked_pass := pass_of(kind):
                    why = missing(asked_pass.name, source)
                else:
                    why = reasons.get(source)
                if why and slot not in request.metric.optional:
                    reasons.setdefault(request.name, why)
    return reasons


def evaluate(
    requests: Sequence[Request],
    answers: Mapping[Question, Any],
    log: Callable[[str, str], Value],
    missing: Why = lambda pass_name, data: None,
) -> dict[str, Value]:
    """Compute the requests, which come each after what it needs.

    Args:
        answers: what the model said: (pass, data) -> records.
        log: ("reference" or "target", name of a metric) -> its value there.
        missing: (pass, data) -> why it could not be run; what needs it is not computed, and says
            why.
    """
    reasons = not_computable(requests, log, missing)
    values: dict[str, Value] = {}

    def get(kind: str, source: str) -> Any:
        """What stands for one name, None where there is nothing."""
        if kind in LOGS:
            entry = log(kind, source)
        elif asked_pass := pass_of(kind):
            return answers.get((asked_pass.name, source))
        else:
            entry = values[source]
        return None if entry.not_computed else entry

    for request in requests:
        if request.name in reasons:
            values[request.name] = Value.missing(reasons[request.name])
            continue
        inputs: list[Any] = []
        for slot, kind in request.metric.inputs.items():
            names = request.inputs.get(slot)
            if names is None or isinstance(names, str):
                inputs.append(None if names is None else get(kind, names))
            else:
                inputs.append([get(kind, source) for source in names])
        value = request.metric.fn(*inputs, **request.settings)
        values[request.name] = _with_advice(value, request, log) if value.not_computed else value
    return values


def _with_advice(value: Value, request: Request, log: Callable[[str, str], Value]) -> Value:
    """A metric that could not do without a log that is optional: also how to come by that."""
    missing = [log(kind, source).not_computed for kind, source in request.sources() if kind in LOGS]
    return Value.missing("; ".join(filter(None, (value.not_computed, *missing))))
