"""Write the evidence of an answered request: what is in its entries (:mod:`.evidence_chain`).

Everything that another run of the same request would have otherwise (times, memory) is in the
entry ``measured``, and in the two that follow from it.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from unlora.deletion.evidence_chain import FIGURES, REQUEST, ROWS, entry, write_entries
from unlora.deletion.exact_route import ExactRoute
from unlora.deletion.plan import Plan
from unlora.deletion.request_stages import model_of
from unlora.model.lineage import Lineage, fingerprint
from unlora.results.audit_log import FILE as AUDIT
from unlora.results.audit_log import FOLDER, SCORES
from unlora.runs.atomic_files import write_json, write_text
from unlora.runs.safe_loading import read_json
from unlora.studies.stage_run import Record
from unlora.studies.stages import Stage

EXACT = {
    "name": "exact",
    "sentence": "The model was trained again without these rows, with the settings of before. What "
    "it says about them, it has from elsewhere.",
}


def write_evidence(plan: Plan, stages: Sequence[Stage], home: Path, folder: Path) -> Path:
    """Write the folder; ``evidence.json`` comes last, so that it is there only with all others."""
    folder.mkdir(parents=True, exist_ok=True)
    request = _request(plan)
    write_json(folder / REQUEST, request)
    if plan.order.keep_rows:
        lines = (json.dumps(row, ensure_ascii=False, default=str) for row in plan.rows)
        write_text(folder / ROWS, "".join(f"{line}\n" for line in lines))
    audits = [stage for stage in stages if stage.kind == "audit"]
    for stage in audits:
        write_json(folder / scores_file(stage.run), read_json(_of_audit(stage, SCORES)))
    contents = {
        "request": request,
        "seen": _seen(plan),
        "route": _route(plan),
        "model": _model(plan, stages),
        "audit": _audit(plan, audits[0]),
        "earlier": [_came_back(plan, stage) for stage in audits[1:]],
        "versions": _versions(stages),
        "measured": _measured(plan, stages, home),
    }
    entries: list[dict[str, Any]] = []
    for kind, content in contents.items():
        plain = json.loads(json.dumps(_finite(content), default=str))
        entries.append(entry(kind, plain, entries[-1]["sha256"] if entries else None))
    return write_entries(folder, entries)


def scores_file(check: str) -> str:
    """Where the scores of an audit are: ``check-scores.json``."""
    return f"{check}-scores.json"


def _request(plan: Plan) -> dict[str, Any]:
    return {
        "id": plan.name,
        "rows": len(plan.rows),
        "hashes": plan.hashes,
        "source": {
            "declared": plan.request.declared, "datasets_dir": plan.request.datasets_dir,
        },
        "where": plan.order.where,
        "model": plan.order.model,
        "rows_kept": plan.order.keep_rows,
    }  # fmt: skip


def _seen(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "run": str(seen.run.folder),
            "parts": seen.parts,
            "nearly": sum(map(len, seen.near.values())),
            "learnt": seen.learnt,
            "unreadable": seen.unreadable,
        }
        for seen in plan.seen
    ]  # fmt: skip


def _route(plan: Plan) -> dict[str, Any]:
    routes = {"exact": plan.exact, "approximate": plan.approximate}
    content: dict[str, Any] = {
        "name": plan.chosen,
        "asked_for": plan.order.route,
        "why_not": {name: route for name, route in routes.items() if isinstance(route, str)},
        "seen_by_any": any(seen.learnt for seen in plan.seen),
    }
    if isinstance(plan.route, ExactRoute):
        trained = [{"run": str(again.run.folder), "removed": again.removed, "left": again.left}
                   for again in plan.route.retrainings]  # fmt: skip
        dropped = [str(run.folder) for run in plan.route.dropped]
        return {**content, "trained_again": trained, "dropped": dropped}
    return {**content, "method": plan.route.method, "steps": plan.route.steps,
            "dial": plan.order.dial, "like": str(plan.route.like.folder)}  # fmt: skip


def _model(plan: Plan, stages: Sequence[Stage]) -> dict[str, Any]:
    path = model_of(list(stages))
    made = [stage for stage in stages if stage.kind != "audit"]
    return {
        "path": path,
        "before": plan.order.model,
        "sha256": [_weights(Path(stage.folder)) for stage in made],
        "stages": [{"name": s.name, "folder": s.folder, "seed": s.seed} for s in made],
        "earlier": [request.name for request in plan.earlier],
        "scale": read_json(Path(path) / "manifest.json").get("scaled", {}).get("scale"),
    }


def _weights(folder: Path) -> str:
    """The hash by which a lineage knows what was trained."""
    links = Lineage.read(str(folder)).links
    own = [link.sha256 for link in links if link.path.resolve() == folder.resolve()]
    return own[0] if own else fingerprint(str(folder))


def _audit(plan: Plan, stage: Stage) -> dict[str, Any]:
    content = read_json(_of_audit(stage, AUDIT))
    names = (*FIGURES, "verdict", "thresholds", "baseline", "forget_rows", "models", "not_run")
    figures = {name: content[name] for name in names}
    figures["judged"] = figures.pop("verdict")
    is_exact = isinstance(plan.route, ExactRoute)
    return {**figures, "verdict": EXACT if is_exact else figures["judged"],
            "scores": scores_file(stage.run)}  # fmt: skip


def _came_back(plan: Plan, stage: Stage) -> dict[str, Any]:
    """What is left of an earlier request's rows now, beside what was left of them then."""
    content, name = read_json(_of_audit(stage, AUDIT)), stage.run.removeprefix("earlier-")
    facts = next(request.facts for request in plan.earlier if request.name == name)
    plain, then = content["attacks"][0], facts["audit"]["attacks"][0]
    known = content["thresholds"]["known"]
    return {
        "id": name,
        "residual": plain["residual"],
        "interval95": plain["interval95"],
        "then": then["residual"],
        "came_back": (plain["residual"] or 0) > known and (then["residual"] or 0) <= known,
        "thresholds": content["thresholds"],
        "baseline": content["baseline"],
        "attacks": content["attacks"],
        "scores": scores_file(stage.run),
    }


def _versions(stages: Sequence[Stage]) -> dict[str, Any]:
    trained = next(stage for stage in stages if stage.kind == "train")
    manifest = read_json(Path(trained.folder) / "manifest.json")
    return {key: manifest.get(key) for key in ("versions", "python", "git_commit", "hardware")}


def _measured(plan: Plan, stages: Sequence[Stage], home: Path) -> dict[str, Any]:
    seconds = {stage.name: Record.of(stage, home).read().get("seconds") for stage in stages}
    peaks = [read_json(Path(stage.folder) / "manifest.json").get("peak_memory_bytes")
             for stage in stages if stage.kind == "train"]  # fmt: skip
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "estimated_seconds": plan.route.seconds,
        "estimated_memory_bytes": plan.route.memory,
        "peak_memory_bytes": peaks,
    }


def _of_audit(stage: Stage, name: str) -> Path:
    return Path(stage.folder) / FOLDER / name


def _finite(content: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(content, Mapping):
        return {str(key): _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and content - content != 0 else content
