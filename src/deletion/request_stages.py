"""Make a deletion request a small study: stages that wait for each other."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from unlora.cli.compose import composed
from unlora.deletion.approximate_route import RETAIN_ROWS, ApproximateRoute
from unlora.deletion.earlier import EVIDENCE, answered
from unlora.deletion.exact_route import ExactRoute
from unlora.deletion.plan import Plan
from unlora.deletion.request_rows import TEXT, DataSet
from unlora.studies.audit_stages import DIALLED, PLAIN
from unlora.studies.stages import Stage

OF_EVALUATION = ("question_key", "answer_key", "text_key", "max_length", "hf_args")


def stages_of(plan: Plan, home: Path) -> list[Stage]:
    """What is trained, dialled and attacked, in this order; the last training is the result.

    Args:
        home: the folder of the request's models.
    """
    route = plan.route
    made = _retrained(route, home) if isinstance(route, ExactRoute) else _unlearned(plan, home)
    model = made[-1].folder
    check = _check(plan, model, home / "check", plan.request, made[-1].name)
    return [*made, check, *_earlier(plan, model, home, made[-1].name)]


def model_of(stages: list[Stage]) -> str:
    """The folder of the model that answers the request."""
    return next(stage for stage in reversed(stages) if stage.kind != "audit").folder


def _retrained(route: ExactRoute, home: Path) -> list[Stage]:
    stages: list[Stage] = []
    model = route.start
    for number, again in enumerate(route.retrainings, start=1):
        config = again.run.config
        name = "exact" if number == len(route.retrainings) else f"exact-{number}"
        layout = again.run.manifest.get("batch_layout") or {}
        params: dict[str, Any] = {"data": again.data}
        if layout.get("processes", 1) > 1:  # the rows of a step stay, however many share them
            params["global_batch_size"] = again.run.manifest["effective_batch"]
        stages.append(Stage(
            "train", name, "request", config["trainer"]["args"].get("seed", 42), str(home / name),
            "unlearn" if config["mode"] == "unlearn" else "train", (), params, model=model,
            needs=(stages[-1].name,) if stages else (), again=str(again.run.folder),
        ))  # fmt: skip
        model = stages[-1].folder
    return stages


def _unlearned(plan: Plan, home: Path) -> list[Stage]:
    route, order = plan.route, plan.order
    assert isinstance(route, ApproximateRoute)
    seed = composed("unlearn", route.overrides).trainer.args.seed
    train = Stage(
        "train", route.method, "request", int(seed), str(home / route.method), "unlearn",
        route.overrides, route.params, model=order.model,
    )  # fmt: skip
    if order.dial == "none":
        return [train]
    told = {**_told(plan, plan.request), "to": order.dial, "otherwise": "trained"}
    return [train, Stage(
        "dial", route.method + DIALLED, "request", int(seed), train.folder + DIALLED, "unlearn", (),
        told, model=train.folder, needs=(train.name,),
    )]  # fmt: skip


def _check(plan: Plan, model: str, folder: Path, rows: DataSet, needs: str, **told: Any) -> Stage:
    return Stage(
        "audit", folder.name, "request", None, str(folder), "unlearn", (),
        {**_told(plan, rows, model), "output_dir": str(folder / "audit"), **told}, model=model,
        needs=(needs,),
    )  # fmt: skip


def _told(plan: Plan, rows: DataSet, model: str | None = None) -> dict[str, Any]:
    """The words of an audit's config.

    Of a model that was trained again there is nothing to attack: it is the retain model itself.
    """
    config = composed("audit", plan.order.audit_words)
    is_exact = isinstance(plan.route, ExactRoute)
    data = {"forget": as_asked(rows)}
    if retain := _retain(plan):
        data["retain"] = as_asked(_some_of(retain))
    if holdout := _holdout(plan):
        data["holdout"] = holdout
    return {
        "audit": PLAIN if is_exact else OmegaConf.to_container(config.audit),
        "thresholds": OmegaConf.to_container(config.thresholds),
        "target": plan.order.model,
        "retain_model": model if is_exact else _exact_model(plan) or "auto",
        "data": data,
    }


def _earlier(plan: Plan, model: str, home: Path, needs: str) -> Iterator[Stage]:
    """Asks the rows of every earlier request again, plainly."""
    for request in plan.earlier:
        yield _check(
            plan, model, home / f"earlier-{request.name}", request.request, needs, audit=PLAIN,
            target=request.facts["model"]["before"],
        )  # fmt: skip


def _retain(plan: Plan) -> DataSet | None:
    """The first data set of what is to be kept."""
    route = plan.route
    if isinstance(route, ApproximateRoute):
        return route.retain[0] if route.retain else None
    last = route.retrainings[-1]
    part = "train" if last.data.get("train") else "retain"
    name, declared = next(iter(last.data[part].items()))
    return DataSet(part, name, declared, (last.run.config.get("paths") or {}).get("datasets_dir"))


def _holdout(plan: Plan) -> dict[str, Any] | None:
    """Rows that nobody was trained on, where a run of the lineage was evaluated on such."""
    for run_rows in reversed(plan.seen):
        for suite in (run_rows.run.config.get("eval") or {}).values():
            declared = (suite.get("data") or {}).get("holdout") or {}
            if (declared.get("hf_args") or {}).get("path"):
                return dict(declared)
    return None


def _some_of(data_set: DataSet) -> DataSet:
    """Rows of a data set, evenly spread."""
    numbers = list(data_set.numbered())
    return data_set.with_rows(numbers[:: -(-len(numbers) // RETAIN_ROWS)])


def as_asked(data_set: DataSet) -> dict[str, Any]:
    """A data set of training as evaluation declares it."""
    args = data_set.declared["args"]
    columns = {k: v for k, v in data_set.columns.items() if data_set.is_text == (k == "text_key")}
    settings = columns | {k: args[k] for k in OF_EVALUATION if k in args}
    if data_set.declared["handler"] == TEXT:
        return {"handler": "CompletionDataset", **settings}
    return {"handler": "QADataset", "max_new_tokens": 200, **settings}


def _exact_model(plan: Plan) -> str | None:
    """The model that an exact answer to the same request has made, where there is one."""
    hashes = sorted(plan.hashes)
    for request in answered(EVIDENCE):
        model, is_exact = request.facts["model"], request.facts["route"]["name"] == "exact"
        is_same = is_exact and sorted(request.facts["request"]["hashes"]) == hashes
        if is_same and Path(model["path"]).is_dir():
            return str(model["path"])
    return None
