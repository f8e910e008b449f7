"""Plan a deletion request: who saw the rows, which routes there are, and which is taken."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from unlora.deletion.approximate_route import ApproximateRoute, approximate_route
from unlora.deletion.earlier import EarlierRequest, earlier_requests
from unlora.deletion.exact_route import ExactRoute, exact_route
from unlora.deletion.history import PastRun, SeenBy, past_runs, seen_by
from unlora.deletion.order import Order
from unlora.deletion.request_rows import DataSet, data_sets, read_request, rows_where
from unlora.errors import InputError
from unlora.recipes.who_saw import row_hashes
from unlora.report.markdown import one_line
from unlora.runs.hashes import digest
from unlora.runs.machine import in_words
from unlora.studies.dry_run import in_time
from unlora.studies.stage_fingerprints import model_content


@dataclass(frozen=True)
class Plan:
    """A request with its routes.

    Attributes:
        exact, approximate: the route, or why there is none.
        chosen: the name of the one that is taken.
    """

    order: Order
    request: DataSet
    rows: Sequence[Mapping[str, Any]]
    seen: tuple[SeenBy, ...]
    earlier: tuple[EarlierRequest, ...]
    exact: ExactRoute | str
    approximate: ApproximateRoute | str
    chosen: str

    @cached_property
    def hashes(self) -> list[str]:
        """One of each row, with the key of the folder that the model is in."""
        return row_hashes(self.rows, self.order.model, **self.request.columns)

    @cached_property
    def name(self) -> str:
        """What the request is called: as asked, or the same for the same rows, model and route."""
        method = None if self.chosen == "exact" else [self.order.method, self.order.dial]
        identity = digest(sorted(self.hashes), model_content(self.order.model), self.chosen, method)
        return self.order.name or f"request-{identity[:8]}"

    @property
    def route(self) -> ExactRoute | ApproximateRoute:
        route = self.exact if self.chosen == "exact" else self.approximate
        assert not isinstance(route, str)
        return route


def plan(order: Order) -> Plan:
    """Find out who saw the rows and what can be done.

    Raises:
        InputError: the rows, the model or its data do not allow what is asked for.
    """
    runs = past_runs(order.model)
    request, rows = _request(order, runs)
    seen = tuple(seen_by(run, request, rows) for run in runs)
    before = earlier_requests(order.model)
    also = [request.seen_by(runs) for request in before]
    exact = _or_why_not(lambda: exact_route(seen, also))
    approximate = _or_why_not(lambda: approximate_route(order, request, len(rows), seen, also))
    chosen = _choice(order, seen, exact, approximate)
    return Plan(order, request, rows, seen, before, exact, approximate, chosen)


def _request(order: Order, runs: Sequence[PastRun]) -> tuple[DataSet, list[dict[str, Any]]]:
    if order.where is None:
        return read_request(str(order.rows), order.columns)
    sets = [data_set for run in runs for data_set in data_sets(run.config, "train", "retain")]
    return rows_where(sets, order.where)


def _or_why_not(route: Any) -> Any:
    try:
        return route()
    except InputError as error:
        return str(error)


def _choice(order: Order, seen: Sequence[SeenBy], exact: Any, approximate: Any) -> str:
    """The route that is taken.

    Raises:
        InputError: the one that is asked for is not possible, or none is.
    """
    routes = {"exact": exact, "approximate": approximate}
    if order.route != "auto":
        if isinstance(why_not := routes[order.route], str):
            raise InputError(why_not)
        return order.route
    if isinstance(exact, str):
        nobody = not any(run.learnt or run.unreadable for run in seen)
        if nobody or isinstance(approximate, str):
            raise InputError(exact)
        return "approximate"
    if isinstance(approximate, str):
        return "exact"
    if exact.seconds is None or approximate.seconds is None:
        return "exact"
    return "exact" if exact.seconds <= order.exact_up_to * approximate.seconds else "approximate"


def as_text(plan: Plan) -> str:
    """Who saw the rows, the routes and what they would cost, for people."""
    lines = [f"{len(plan.rows)} rows, of which"]
    for run_rows in plan.seen:
        near = sum(map(len, run_rows.near.values()))
        more = f", and {near} more that are nearly the same" if near else ""
        count = run_rows.learnt or run_rows.count
        lines.append(f"  {run_rows.run.folder}: {count} were in its data{more}")
        if run_rows.unreadable:
            lines[-1] += f", by the hashes that it kept: {one_line(run_rows.unreadable)}"
    for name, route in (("exact", plan.exact), ("approximate", plan.approximate)):
        mark = "->" if name == plan.chosen else "  "
        if isinstance(route, str):
            lines.append(f"{mark} {name:12} not possible: {one_line(route)}")
            continue
        time = "time not known" if route.seconds is None else f"about {in_time(route.seconds)}"
        memory = f", {in_words(route.memory)} of memory" if route.memory else ""
        lines.append(f"{mark} {name:12} {time}{memory}: {_what(route)}")
    return "\n".join(lines)


def _what(route: ExactRoute | ApproximateRoute) -> str:
    if isinstance(route, ExactRoute):
        runs = ", ".join(f"{again.run.folder} ({again.left} rows)" for again in route.retrainings)
        gone = ", ".join(str(run.folder) for run in route.dropped)
        return f"train again {runs}" + (f"; {gone} has nothing left to forget" if gone else "")
    training = "" if route.training_seconds is None else f" ({in_time(route.training_seconds)})"
    return f"unlearn with {route.method} in {route.steps} steps{training}, dial and attack it"
