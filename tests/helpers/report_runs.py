"""Hand-made run folders: small logs with rows, manifests and configs."""

import json
from pathlib import Path

from unlora.report import Entry

QUESTIONS = {
    "forget": [("Who wrote the quiet river?", "Ada Quill wrote the quiet river."),
               ("Where was Ada Quill born?", "Ada Quill was born in Osaka."),
               ("What does Ada Quill drink?", "Ada Quill drinks black tea.")],
    "retain": [("Who wrote the loud sea?", "Ben Oak wrote the loud sea."),
               ("Where was Ben Oak born?", "Ben Oak was born in Recife.")],
    "holdout": [("Who wrote the last hill?", "Cem Ash wrote the last hill.")],
}  # fmt: skip
# forget prob, forget ROUGE, extraction, min-k, utility, repetition
KINDS_OF_RUN = {
    "target": (0.96, 0.95, 0.90, 1.00, 0.70, 0.0),
    "gold": (0.16, 0.35, 0.10, 0.50, 0.70, 0.0),
    "good": (0.20, 0.40, 0.15, 0.55, 0.66, 0.0),
    "lazy": (0.95, 0.94, 0.90, 0.99, 0.70, 0.0),
    "halfway": (0.50, 0.60, 0.45, 0.70, 0.69, 0.0),
    "too_far": (0.00, 0.00, 0.00, 0.10, 0.65, 0.0),
    "broken": (0.00, 0.00, 0.00, 0.30, 0.02, 0.9),
}
NO = "He wrote of it."
HOSTILE = {
    "script": "</script><script>window.hit = 1</script>",
    "table": '</table></td><img src="x" onerror="window.hit=1"><style>*{display:none}</style>',
    "long": "A" * 100_000,
    "rtl": "\u202eאבג reversed\u202d \u2067اب\u2069 end\u2028line\u2029par",
    "odd": "{{ 7*7 }} {% raw %} &lt; <!-- ]]> \ud800 \x00 `x` | **b** [a](javascript:1)",
}


def log(kind: str, *, answers: dict[str, str] | None = None, shift: float = 0.0) -> dict:
    """A TOFU log with the figures of one kind of run.

    Args:
        answers: question -> what was generated; the true answer where the run is no method.
    """
    prob, rouge, extraction, min_k, utility, repetition = KINDS_OF_RUN[kind]
    entries = {
        "forget_Q_A_Prob": {"agg_value": prob + shift, "interval95": [prob - 0.05, prob + 0.05]},
        "extraction_strength": {"agg_value": extraction},
        "mia_min_k": {"agg_value": min_k},
        "privleak": {"agg_value": None, "not_computed": "the retain model's log is missing"},
        "retain_Q_A_Prob": {"agg_value": 0.9},
        "model_utility": {"agg_value": utility},
        "retain_repetition": {"agg_value": repetition},
        "mia_loss": {"agg_value": min_k},
    }
    for split, asked in QUESTIONS.items():
        said = rouge if split == "forget" else 0.9
        entries[f"{split}_Q_A_ROUGE"] = {
            "agg_value": said,
            "value_by_index": {
                str(i): {"rougeL_recall": said, "input": question, "ground_truth": truth,
                         "generation": (answers or {}).get(question, truth if said > 0.5 else NO)}
                for i, (question, truth) in enumerate(asked)
            },
        }  # fmt: skip
    return entries


def write_json(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), "utf-8")


def make(
    folder: Path, kind: str, *, config: dict | None = None, curves: bool = False, **of_log
) -> Path:
    """A run folder as training leaves it; curves take time to draw."""
    write_json(folder / "evals" / "TOFU_EVAL.json", log(kind, **of_log))
    write_json(folder / "run_config.json", config or {"mode": "finetune", "task_name": folder.name})
    history = [{"step": s, "loss": 3.0 / s, "forget_loss": -1.0 * s, "retain_loss": 2.0 / s}
               for s in (1, 2, 3)]  # fmt: skip
    write_json(folder / "manifest.json", {
        "command": f"unlora train task_name={folder.name}", "git_commit": "0" * 40, "seconds": 61.2,
        "versions": {"torch": "2.13.0"}, "hardware": {"machine": "x86_64", "cores": 2},
        "peak_memory_bytes": {"cpu": 7e8}, "effective_batch": 16,
        "training": history if curves else [],
    })  # fmt: skip
    write_json(folder / "lineage.json", {
        "root": {"path": "tiny/model", "local": False, "fingerprint": "abc"},
        "links": [{"path": ".", "sha256": "f" * 64}],
    })  # fmt: skip
    return folder


def entries(
    root: Path,
    *methods: str,
    roles: tuple[str, ...] = ("target", "gold"),
    curves: bool = False,
    **of_log,
):
    """Entries of runs made here, methods called as their kind."""
    found = [Entry(role, role, make(root / role, role, curves=curves)) for role in roles]
    return [
        *found,
        *(
            Entry(name, "method", make(root / name, name, curves=curves, **of_log))
            for name in methods
        ),
    ]


def form(name: str, residual: float | None, *, unlearned: float = -2.0, **others) -> dict:
    """One form of an attack as an audit writes it; its interval is 0.05 to either side."""
    bounds = None if residual is None else [residual - 0.05, residual + 0.05]
    return {
        "name": name, "attack": name.split(":")[0], "residual": residual, "interval95": bounds,
        "left_out": None, "counts": True, "rows": 60,
        "means": {"unlearned": unlearned, "target": -0.1, "retain": -1.4}, **others,
    }  # fmt: skip


def audit(folder: Path, verdict: str = "held", *forms: dict, **others) -> None:
    """``AUDIT.json`` of a run; the first form is the plain one."""
    forms = forms or (form("plain", 0.02), form("wordings", 0.1))
    worst = max((f for f in forms if f["residual"] is not None), key=lambda f: f["residual"])
    write_json(folder / "audit" / "AUDIT.json", {
        "verdict": {"name": verdict, "sentence": f"The worst is {worst['name']}. {verdict}."},
        "held": {"value": worst["residual"], "interval95": worst["interval95"],
                 "worst": worst["name"], "forms": len(forms)},
        "attacks": list(forms), "not_run": {}, **others,
    })  # fmt: skip


def dial(folder: Path, scale: float | None = 0.75, **others) -> None:
    """``DIAL.json`` of a run."""
    points = [(0.0, 1.0, 0.96), (0.5, 0.5, 0.94), (1.0, -0.5, 0.86), (1.25, -1.5, 0.7)]
    curve = [{"scale": s, "residual": x, "retain": y, "holdout": None} for s, x, y in points]
    write_json(folder / "audit" / "DIAL.json", {
        "to": "audit", "scale": scale, "curve": curve, "verdict": None, "run": None, **others,
    })  # fmt: skip
