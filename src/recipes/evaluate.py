"""Evaluate a model: ``python src/eval.py experiment=eval/tofu/default task_name=mine``."""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

logger = logging.getLogger("unlora.recipes.evaluate")


def run(cfg: Any) -> dict[str, float]:
    """Evaluate the model of the config with every suite of its section ``eval``.

    The model is loaded only if something must be asked that is not known of it yet.

    Returns:
        metric -> value, over all suites; nothing where only the plan is wanted.

    Raises:
        InputError: something in the config or the data can be put right by its writer.
    """
    from unlora.config import read
    from unlora.config.resolve import plain

    config = read(cfg)

    from unlora.evals import evaluate_all
    from unlora.evals.passes.batching import halvings
    from unlora.evals.processes import joined
    from unlora.evals.progress import without_library_bars
    from unlora.model import resolve_model
    from unlora.recipes import baselines
    from unlora.recipes.baselines.evaluation import build
    from unlora.runs.atomic_files import is_main_process
    from unlora.runs.run import Run, alone, full_disk_in_words

    quiet, folder = config.output != "lines", config.paths.output_dir
    if quiet and is_main_process():  # the others say less already
        logging.getLogger().setLevel(logging.WARNING)
    resolved = resolve_model(config.model)
    config = config.model_copy(update={"model": resolved.section})
    with ExitStack() as stack:
        if quiet:
            stack.enter_context(without_library_bars())
        stack.enter_context(joined())
        references = baselines.find(config)
        sections = references.eval if config.plan else baselines.evaluated(config, references)
        suites = build(config, resolved, sections)
        subject = _lazy_model(config, resolved, stack)
        if config.plan:
            _show_plan(suites, subject, as_json=config.output == "json")
            return {}
        # of its own kind: what a training has left may be evaluated while another runs into it
        stack.enter_context(full_disk_in_words(folder))
        halved = stack.enter_context(halvings())
        stack.enter_context(alone(folder, "eval"))
        record = Run(folder, plain(cfg) | {"model": dict(config.model)}, kind="eval")
        summary = evaluate_all(suites, subject, quiet=quiet)
        record.begin(fresh=False)  # one that fails leaves an earlier one as it was
    ran_out = {"memory_ran_out": {"evaluation": halved}} if halved else {}
    record.finish(lineage=str(resolved.lineage), **ran_out, summary=summary)
    if is_main_process():
        _show_summary(summary, suites, config.output)
    logger.info("finished: %s", folder)
    return summary


def _lazy_model(config: Any, resolved: Any, stack: ExitStack) -> Any:
    """The model under evaluation, loaded when it is first asked; ``stack`` guards its weights."""
    import torch

    from unlora.evals import LazyModel
    from unlora.evals.eval_model import NO_ADAPTERS
    from unlora.model import get_model
    from unlora.model.fingerprints import identities
    from unlora.model.guards import evaluation_is_pure
    from unlora.model.quantised import placed
    from unlora.recipes.baselines import made_to_forget

    key, root_key = identities(resolved)

    def load() -> Any:
        model, _ = get_model(resolved, trainable=False)
        if torch.cuda.is_available() and not placed(model):
            model.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        stack.enter_context(evaluation_is_pure(model))
        return model

    without_root = None if resolved.lineage.links else NO_ADAPTERS
    return LazyModel(load, key, root_key, without_root, is_target=not made_to_forget(config))


def _show_plan(suites: Sequence[Any], subject: Any, *, as_json: bool) -> None:
    """Print what would be run, and what would not be computed."""
    from unlora.runs.atomic_files import is_main_process

    planned = [row for suite in suites for row in suite.plan(subject)]
    if not is_main_process():
        return
    if as_json:
        print(json.dumps(planned))
        return
    print(as_text(planned))
    print(first_rows(planned))
    for suite in suites:
        reasons = suite.not_computable_for(subject)
        for why in dict.fromkeys(reasons.values()):
            names = [name for name, reason in reasons.items() if reason == why]
            print(f"not computed: {', '.join(names)}: {why}")


def _show_summary(summary: Mapping[str, float], suites: Sequence[Any], output: str) -> None:
    """Print the figures as ``output`` says; a note on them is a warning where nothing else is."""
    note, text = figures(summary, [(suite.output_dir, suite.kind) for suite in suites])
    if output == "json":
        finite = {k: v if math.isfinite(v) else None for k, v in summary.items()}
        print(json.dumps({"note": note} | finite if note else finite))
    elif output == "lines":
        print("\n".join(filter(None, (note, text))))
    elif note:
        logger.warning("%s", note)


def lines(
    summary: Mapping[str, float],
    bounds: Mapping[str, tuple[float, float]],
    notes: Mapping[str, str] | None = None,
) -> str:
    """One line for each metric: its value, the 95 % interval where it has one, and its note."""
    from unlora.runs.redaction import printable

    width = max(map(len, summary), default=0)
    rows = []
    for name, value in sorted(summary.items()):
        interval = "  [{:.4g}, {:.4g}]".format(*bounds[name]) if name in bounds else ""
        note = f"  ({printable((notes or {})[name])})" if name in (notes or {}) else ""
        rows.append(f"{printable(name):{width}}  {value:.6g}{interval}{note}")
    return "\n".join(rows)


def figures(summary: Mapping[str, float], logs: Sequence[tuple[Any, str]]) -> tuple[str, str]:
    """What should be known before any figure, empty for nothing, and the figures by line.

    Args:
        logs: folder and kind of each log that the figures stand in.
    """
    from unlora.results.eval_log import read_written

    written = [read_written(Path(folder), kind) for folder, kind in logs]
    entries = {name: entry for log, _ in written for name, entry in log.items()}
    bounds = {name: e.written_interval for name, e in entries.items() if e.written_interval}
    notes = {name: entry.note for name, entry in entries.items() if entry.note}
    return " ".join(filter(None, (note for _, note in written))), lines(summary, bounds, notes)


def as_text(planned: Sequence[Mapping[str, Any]]) -> str:
    """The plan of an evaluation as a table, with what is left to do in its last line."""
    show: Callable[..., str] = "{:14} {:28} {:>7} {:>10}  {}".format
    rows = [show("pass", "data", "rows", "tokens", "")]
    for entry in planned:
        note = "kept from before" if entry["kept"] else ""
        rows.append(
            show(entry["pass"], entry["data"], entry["rows"], entry["tokens"], note).rstrip()
        )
    new = [entry for entry in planned if not entry["kept"]]
    totals = (sum(entry[column] for entry in new) for column in ("rows", "tokens"))
    rows.append(show("to be run", f"{len(new)} of {len(planned)}", *totals, "").rstrip())
    return "\n".join(rows)


def first_rows(planned: Sequence[Mapping[str, Any]]) -> str:
    """The first row of each data set as tokens, as it is scored and as it is gone on from."""
    from unlora.data.first_row import as_lines

    rows: dict[str, dict[str, Sequence[str]]] = {}
    for entry in planned:
        rows.setdefault(entry["data"], {}).update(entry.get("first", {}))
    return "\n".join(as_lines(name, parts) for name, parts in rows.items() if parts)
