"""A whole study: a target, its gold reference, and every method, over seeds, in one table.

    python src/study.py --config-name=study experiment=study/pocket/lora

For every seed the gold model is trained first (it never sees what is to be forgotten and is what
forgetting is measured against), then the target, then every method from that target. Each stage is
a run of ``train.py`` with its own config; independent stages run side by side in ``workers``
processes.
"""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

logger = logging.getLogger("unlora.study")


@dataclass(frozen=True)
class Stage:
    """One training run of a study.

    Attributes:
        after: the stage of the same seed that must be finished before.
        config: the primary config, ``train`` or ``unlearn``.
    """

    run: str
    seed: int
    folder: Path
    config: str
    overrides: tuple[str, ...]
    after: str | None

    @property
    def name(self) -> str:
        return f"{self.run} (seed {self.seed})"


def run(cfg: Any) -> dict[str, Any]:
    """Run every stage and write ``summary.json`` and ``table.txt`` into the study's folder.

    Returns:
        run -> metric -> ``{"mean", "seeds"}``.

    Raises:
        InputError: the config is wrong; nothing has run then.
    """
    from unlora.config import plain
    from unlora.report.table import as_text, over_seeds
    from unlora.run import Run, write_json

    study = _checked(plain(cfg))
    folder = Path(study["paths"]["output_dir"])
    stages = plan(study, folder)
    record = Run(str(folder), study)
    _prepare(stages[0])
    record.begin(fresh=True)
    summaries = _run_all(stages, study["workers"])
    runs = list(dict.fromkeys(stage.run for stage in _in_table_order(stages)))
    metrics = sorted({metric for summary in summaries.values() for metric in summary})
    results = {
        name: over_seeds([summaries[name, seed] for seed in study["seeds"]], metrics)
        for name in runs
    }
    table = as_text(results)
    write_json(folder / "summary.json", results)
    (folder / "table.txt").write_text(table + "\n", "utf-8")
    record.finish(stages={f"{s.run}/seed{s.seed}": list(s.overrides) for s in stages})
    seeds = len(study["seeds"])
    print(f"\n{table}\n\nMeans over {seeds} seed{'s' * (seeds > 1)}. "
          f"collapsed: utility below half of the target's.\nEverything is in {folder}")  # fmt: skip
    return results


def plan(study: dict[str, Any], folder: Path) -> list[Stage]:
    """The stages of a study, each after the one it needs."""
    stages = []
    for seed in study["seeds"]:
        home = folder / f"seed{seed}"
        model = f"model.model_args.pretrained_model_name_or_path={home / 'target'}"
        wanted = [
            ("gold", "train", study["gold"], None),
            ("target", "train", study["target"], "gold"),
        ]
        for method, settings in study["methods"].items():
            overrides = [*study["unlearn"], *(settings or []), model]
            wanted.append((method, "unlearn", overrides, "target"))
        for run, config, overrides, after in wanted:
            common = [f"trainer.args.seed={seed}", f"paths.output_dir={home / run}"]
            if after:
                common.append(f"retain_logs_path={home / 'gold' / 'evals'}")
            stages.append(Stage(run, seed, home / run, config, (*overrides, *common), after))
    return stages


def _checked(study: dict[str, Any]) -> dict[str, Any]:
    from unlora.errors import InputError
    from unlora.registry import unknown

    needed = {"seeds": list, "target": list, "gold": list, "unlearn": list, "methods": dict}
    known = (*needed, "workers", "paths", "mode", "task_name")
    for key in study:
        if key not in known:
            raise InputError(unknown("key of a study", key, known))
    for key, kind in needed.items():
        if not isinstance(study.get(key), kind) or not study[key]:
            what = "a list of overrides" if kind is list else "method: list of overrides"
            what = "a list of numbers" if key == "seeds" else what
            raise InputError(f"The study needs {key}: {what}; it is {study.get(key)!r}.")
    workers = study.get("workers", 1)
    if not isinstance(workers, int) or workers < 1:
        raise InputError(f"workers is {workers!r}; it must be a whole number of processes.")
    for method in study["methods"]:
        if method in ("gold", "target"):
            raise InputError(f"A method cannot be called {method!r}; give it another name.")
    return {**study, "workers": workers}


def _in_table_order(stages: list[Stage]) -> list[Stage]:
    order = {"target": 0, "gold": 1}
    return sorted(stages, key=lambda stage: order.get(stage.run, 2))


def _prepare(stage: Stage) -> None:
    """Compose the first config, and make what all stages share, before they run side by side."""
    from unlora.compose import composed
    from unlora.config import read
    from unlora.model import load_args

    load_args(read(composed(stage.config, stage.overrides)).model)


def _run_all(stages: list[Stage], workers: int) -> dict[tuple[str, int], dict[str, float]]:
    from tqdm import tqdm

    summaries: dict[tuple[str, int], dict[str, float]] = {}
    waiting = list(stages)
    running: dict[Future, Stage] = {}
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_limit_threads, initargs=(workers,)
    )
    bar = tqdm(total=len(stages), unit="run", desc="study", file=sys.stderr, dynamic_ncols=True)
    with pool, bar:
        while waiting or running:
            ready = [s for s in waiting if s.after is None or (s.after, s.seed) in summaries]
            for stage in ready:
                waiting.remove(stage)
                running[pool.submit(run_stage, stage)] = stage
            for future in _next_finished(running, bar):
                stage = running.pop(future)
                summaries[stage.run, stage.seed], seconds = future.result()
                bar.update()
                bar.write(f"  {stage.name}: {seconds:.0f} s", file=sys.stderr)
    return summaries


def _next_finished(running: dict[Future, Stage], bar: Any) -> set[Future]:
    while True:
        finished = wait(running, timeout=1, return_when=FIRST_COMPLETED).done
        if finished:
            return finished
        if sys.stderr.isatty():
            bar.refresh()


def _limit_threads(workers: int) -> None:
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def run_stage(stage: Stage) -> tuple[dict[str, float], float]:
    """Train and evaluate one stage in this process; its output goes to ``log.txt``.

    Returns:
        The summary of its evaluation, and the seconds it took.
    """
    from unlora import train
    from unlora.compose import composed

    started = time.time()
    stage.folder.parent.mkdir(parents=True, exist_ok=True)
    log = stage.folder.with_name(stage.folder.name + ".log.txt")
    with _output_to(log):
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
        summary = train.run(composed(stage.config, stage.overrides))
    return summary, time.time() - started


@contextlib.contextmanager
def _output_to(file: Path) -> Iterator[None]:
    """Send everything that is printed, progress bars included, to a file."""
    with open(file, "w", encoding="utf-8") as stream:
        kept = [os.dup(1), os.dup(2)]
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(stream.fileno(), 1), os.dup2(stream.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            for number, old in enumerate(kept, start=1):
                os.dup2(old, number)
                os.close(old)


if __name__ == "__main__":
    try:
        from unlora.cli import launch
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"{error}. Install this program first: pip install -e . (or make demo)"
        ) from error
    launch(run, "study")
