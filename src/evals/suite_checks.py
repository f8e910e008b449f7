"""Check the config of a suite, before data or a model are read."""

from collections.abc import Callable, Mapping
from typing import Any

from unlora.config.eval_schema import SuiteKeys
from unlora.config.metrics import shipped_metrics
from unlora.config.validation import checked
from unlora.errors import InputError
from unlora.evals.dataset_checks import check_source
from unlora.evals.pass_plan import (
    LOGS,
    Request,
    needed,
    read_request,
)
from unlora.evals.passes.declaration import pass_of
from unlora.registry import unknown
from unlora.results.baseline_log import BaselineLog

KINDS = {
    "TOFUEvaluator": "TOFU",
    "MUSEEvaluator": "MUSE",
    "RWKUEvaluator": "RWKU",
    "OwnDataEvaluator": "OWN",
}


def check_suite(name: str, config: Mapping[str, Any]) -> list[Request]:
    """The metrics of a suite, or those of ``only``, each after what it needs.

    Raises:
        InputError: everything that is wrong in the config, in one message.
    """
    problems: list[str] = []

    def collect(where: str, check: Callable[..., Any], *args: Any) -> Any:
        try:
            return check(*args)
        except InputError as error:
            problems.append(f"{where}{error}")
            return None

    collect("", checked, SuiteKeys, dict(config), "eval", name)
    data, metrics, panel = (config.get(key) or {} for key in ("data", "metrics", "panel"))
    only = config.get("only")
    if problems and not (isinstance(data, Mapping) and isinstance(metrics, Mapping)):
        raise InputError(problems[0])
    for source, section in data.items():
        collect("", check_source, section, "eval", name, "data", source)
    if config.get("rouge") == "ascii":
        metrics = {key: _ascii(metric) for key, metric in metrics.items()}
    if not metrics:
        problems.append(f"eval.{name} has no metrics. Add some under eval.{name}.metrics.")
    where = f"eval.{name}: "
    requests = [collect(where, read_request, key, metrics[key]) for key in sorted(metrics)]
    known = [request for request in requests if request is not None]
    asks = any(pass_of(kind) for request in known for kind, _ in request.sources())
    if asks and not data:
        problems.append(f"eval.{name} has no data sets. Name some under eval.{name}.data.")
    for request in known if data else ():
        for kind, source in request.sources():
            if pass_of(kind) and source not in data:
                missing = unknown("data set", source, data)
                problems.append(f"eval.{name}: metric {request.name}: {missing}")
    if len(known) == len(requests):
        collect(where, needed, known, metrics)
        for key, listed in (("panel", panel), ("only", only)):
            for metric in listed if isinstance(listed, list) else ():
                if str(metric) not in metrics:
                    problems.append(_not_chosen(name, key, str(metric), config["handler"], metrics))
    if only == []:
        problems.append(f"eval.{name}.only is empty. Name metrics, or leave it out for all.")
    for which in LOGS:
        collect(where, BaselineLog.of, which, config, KINDS[config["handler"]])
    if problems:
        raise InputError("\n".join(dict.fromkeys(problems)))
    return needed(known, only or metrics)


def _not_chosen(suite: str, key: str, metric: str, handler: str, metrics: Mapping[str, Any]) -> str:
    """What to do about a name that is none of the suite's metrics."""
    if suite == KINDS[handler].lower() and metric in shipped_metrics(suite):
        return (
            f"eval.{suite}.{key} names {metric!r}, which is not among the metrics that are asked. "
            f"Add it: +eval/{suite}_metrics=[{metric}]"
        )
    return unknown(f"metric in eval.{suite}.{key}", metric, metrics)


def _ascii(metric: Any) -> Any:
    """The declaration of a metric, with ROUGE as published tables have it."""
    is_rouge = isinstance(metric, Mapping) and metric.get("handler") == "rouge"
    return {**metric, "handler": "rouge_ascii"} if is_rouge else metric
