"""Every method on the embedded benchmark, each at the settings that a small search finds.

    make methods            or: python benchmarks/methods.py [--only NPO,SimNPO]

1. On a seed of its own, a target and its gold model are made, and every method is tried with each
   setting of its grid in ``methods.yaml`` (at most 12).
2. The setting with the highest harmonic mean of two numbers is kept: 1 - the Kolmogorov-Smirnov
   distance of the truth ratios to gold's, and the model utility as a share of the target's, at
   most 1. GradDiff is searched like all others.
3. With it, every method runs on three other seeds. ``docs/methods.md`` is written from those.

Every finished run is one line of ``results.jsonl``; what is there is not run again, so the command
goes on where it was stopped. A run is a process of its own with one thread.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from tqdm import tqdm

from unlora.cli.compose import composed
from unlora.errors import GuardError, InputError
from unlora.registry import unknown
from unlora.studies.stage_run import output_to

HERE = Path(__file__).parent
SEARCH_SEED, SEEDS = 100, (0, 1, 2)
MOST_TRIALS = 12
FINETUNE = ("experiment=finetune/pocket/lora",)
GOLD = (*FINETUNE, "data.train.POCKET_QA_full.args.hf_args.name=retain90")
KS = "eval.tofu.metrics.forget_quality_ks"
UNLEARN = (
    "experiment=unlearn/pocket/lora",
    f"{KS}.handler=forget_quality_ks",
    f"{KS}.inputs={{truth_ratio: forget_truth_ratio, retain: forget_truth_ratio}}",
)
PRELOAD = [
    "unlora.trainer",
    "unlora.model",
    "unlora.evals",
    "unlora.data.pocket",
    "unlora.studies.stage_run",
]
COLUMNS = {  # metric -> heading, digits
    "forget_quality": ("forget quality", 3),
    "forget_quality_ks": ("KS distance", 2),
    "model_utility": ("utility", 3),
    "extraction_strength": ("extraction", 3),
    "privleak": ("privleak", 0),
    "forget_Q_A_Prob": ("forget prob", 3),
}


@dataclass(frozen=True)
class Method:
    """One entry of ``methods.yaml``.

    Attributes:
        fixed: overrides that every trial has.
        search: key -> values to try; all combinations are.
        alternates: whether it learns from alternate answers that the target makes first.
    """

    name: str
    paper: str
    about: str
    fixed: tuple[str, ...]
    search: Mapping[str, Sequence[Any]]
    alternates: bool = False

    @property
    def trials(self) -> list[tuple[str, ...]]:
        """The overrides of each trial."""
        axes = [[f"{key}={value}" for value in values] for key, values in self.search.items()]
        found = [tuple(trial) for trial in itertools.product(*axes)]
        if len(found) > MOST_TRIALS:
            raise InputError(
                f"{self.name} has {len(found)} trials; at most {MOST_TRIALS} are fair."
            )
        return found


@dataclass(frozen=True)
class Stage:
    """One run: ``config`` is the primary config, ``train`` or ``unlearn``."""

    run: str
    seed: int
    folder: Path
    config: str
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.run} (seed {self.seed})"


@dataclass(frozen=True)
class Result:
    """What came out of one run, or why nothing did.

    Attributes:
        summary: metric -> value; empty where the run failed.
        seconds: of processor time for the whole run, its evaluation included.
        peak: bytes.
        steps: optimiser steps.
    """

    summary: Mapping[str, float | None]
    seconds: float
    peak: int = 0
    steps: int = 0
    failure: str = ""


class Results:
    """The finished runs, one a line, found by their folder and overrides."""

    def __init__(self, file: Path):
        self.file, self.known = file, {}
        text = file.read_text("utf-8") if file.is_file() else ""
        if text and not text.endswith("\n"):
            file.write_text(text + "\n", "utf-8")  # an interruption cut its last line short
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self.known[entry["key"]] = Result(**entry["result"])
            except (ValueError, KeyError, TypeError):
                continue

    @staticmethod
    def key(stage: Stage) -> str:
        return json.dumps([stage.config, stage.seed, *stage.overrides])

    def __getitem__(self, stage: Stage) -> Result:
        return self.known[self.key(stage)]

    def __contains__(self, stage: Stage) -> bool:
        return self.key(stage) in self.known

    def add(self, stage: Stage, result: Result) -> None:
        self.known[self.key(stage)] = result
        with open(self.file, "a", encoding="utf-8") as stream:
            line = {"key": self.key(stage), "result": asdict(result)}
            stream.write(json.dumps(line) + "\n")


class Benchmark:
    """Targets, gold models, and what methods make of the targets."""

    def __init__(self, folder: Path, workers: int):
        self.folder, self.workers = folder, workers
        folder.mkdir(parents=True, exist_ok=True)
        self.results = Results(folder / "results.jsonl")

    def stage(self, name: str, seed: int, config: str, overrides: Sequence[str]) -> Stage:
        """A run in a folder of its own."""
        home = self.folder / f"seed{seed}" / name
        words = (*overrides, f"trainer.args.seed={seed}", f"paths.output_dir={home}")
        return Stage(name, seed, home, config, words)

    def unlearning(self, method: Method, trial: Sequence[str], number: int, seed: int) -> Stage:
        """One method at one setting, from that seed's target."""
        home = self.folder / f"seed{seed}"
        words = [
            *UNLEARN, *method.fixed, *trial,
            f"model.model_args.pretrained_model_name_or_path={home / 'target'}",
            f"retain_logs_path={home / 'gold' / 'evals'}",
        ]  # fmt: skip
        if method.alternates:
            file = home / "alternates" / "alternates.jsonl"
            words += alternates_override(file)
        return self.stage(f"{method.name}/{number}", seed, "unlearn", words)

    def prepare(
        self, seeds: Iterable[int], *, alternates: bool
    ) -> dict[int, tuple[Result, Result]]:
        """Target and gold model of every seed, and the target's alternate answers."""
        from unlora.data.pocket import base_model

        base_model()  # what all runs share is made once, before they run side by side
        stages = {
            seed: (
                self.stage("target", seed, "train", FINETUNE),
                self.stage("gold", seed, "train", GOLD),
            )
            for seed in seeds
        }
        self.run([stage for both in stages.values() for stage in both])
        if alternates:
            for seed in stages:
                make_alternates(self.folder / f"seed{seed}", seed)
        return {seed: (self.results[a], self.results[b]) for seed, (a, b) in stages.items()}

    def run(self, stages: Sequence[Stage]) -> None:
        """Run what has no result yet, ``workers`` at a time."""
        missing = [stage for stage in stages if stage not in self.results]
        if not missing:
            return
        context = get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        pool = ProcessPoolExecutor(self.workers, mp_context=context, max_tasks_per_child=1)
        bar = tqdm(total=len(missing), unit="run", file=sys.stderr, dynamic_ncols=True)
        with pool, bar:
            running = {pool.submit(run_one, stage): stage for stage in missing}
            for future in as_completed(running):
                stage, result = running[future], future.result()
                self.results.add(stage, result)
                bar.write(f"  {stage.name}: {describe(result)}", file=sys.stderr)
                bar.update()


def run_one(stage: Stage) -> Result:
    """Run one stage in this process; a failure of the method is a result, too."""
    import torch

    from unlora.recipes import train

    torch.set_num_threads(1)
    stage.folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with output_to(stage.folder.with_name(f"{stage.folder.name}.log.txt")):
            summary = train.run(composed(stage.config, stage.overrides))
    except (GuardError, InputError) as error:
        return Result({}, 0.0, failure=str(error).splitlines()[0])
    manifest = json.loads((stage.folder / "manifest.json").read_text("utf-8"))
    peak = manifest["peak_memory_bytes"]["cpu"]
    seconds = sum(os.times()[:2])  # of this process; other work on the machine does not count
    return Result(summary, seconds, peak, manifest["optimiser_steps"])


def make_alternates(home: Path, seed: int) -> None:
    """Alternate answers to the forget questions, by the target of this seed."""
    import subprocess

    if (home / "alternates" / "alternates.jsonl").is_file():
        return
    words = [
        "experiment=unlearn/pocket/lora", f"paths.output_dir={home / 'alternates'}",
        f"model.model_args.pretrained_model_name_or_path={home / 'target'}",
        f"alternates.seed={seed}",
    ]  # fmt: skip
    script = HERE.parent / "src" / "alternates.py"
    subprocess.run([sys.executable, str(script), *words], check=True)


def alternates_override(file: Path) -> list[str]:
    """The overrides with which a run learns from a file of alternate answers."""
    return [
        "data/datasets@data.alternate=alternates",
        f"data.alternate.alternates.args.hf_args.path={file}",
    ]


def score(result: Result, target: Result) -> float:
    """What the search maximises: harmonic mean of closeness to gold and of kept utility."""
    distance, utility = (result.summary.get(x) for x in ("forget_quality_ks", "model_utility"))
    before = target.summary["model_utility"]
    if distance is None or utility is None or not before:
        return 0.0
    close, kept = 1 - distance, min(1.0, utility / before)
    return 2 * close * kept / (close + kept) if close + kept else 0.0


def describe(result: Result) -> str:
    """One line about a result."""
    if result.failure:
        return result.failure
    shown = ("forget_Q_A_Prob", "forget_quality_ks", "model_utility")
    numbers = ", ".join(
        f"{x} {result.summary.get(x) or 0:.3f}" for x in shown if x in result.summary
    )
    return f"{numbers}, {result.seconds:.0f} s"


def read_methods(file: Path, only: Sequence[str]) -> list[Method]:
    """The entries of ``methods.yaml``, all or those named."""
    content = yaml.safe_load(file.read_text("utf-8"))
    methods = [
        Method(
            name, entry["paper"], " ".join(entry["about"].split()),
            tuple(entry.get("fixed") or [f"trainer={name}"]), entry.get("search") or {},
            entry.get("alternates", False),
        )
        for name, entry in content.items()
    ]  # fmt: skip
    names = [method.name for method in methods]
    for name in only:
        if name not in names:
            raise InputError(unknown("method", name, names))
    return [method for method in methods if not only or method.name in only]


# --- the page ------------------------------------------------------------------------------------


def means(results: Sequence[Result]) -> dict[str, float | None]:
    """Metric -> mean over seeds; None where a seed has none."""
    names = {name for result in results for name in result.summary}
    found: dict[str, float | None] = {}
    for name in names:
        values = [result.summary.get(name) for result in results]
        known = [value for value in values if value is not None]
        found[name] = fmean(known) if len(known) == len(values) else None
    return found


def verdict(
    summary: Mapping[str, float | None],
    target: Mapping[str, float | None],
    gold: Mapping[str, float | None],
    graddiff: Mapping[str, float | None],
) -> str:
    """What the row says about a method, by stated thresholds."""

    def of(row: Mapping[str, float | None], name: str) -> float:
        return row.get(name) or 0.0

    if not summary:
        return "failed"
    if of(summary, "model_utility") < 0.5 * of(target, "model_utility"):
        return "collapsed"
    before, after, ideal = (of(x, "forget_Q_A_Prob") for x in (target, summary, gold))
    if before - after < 0.1 * (before - ideal):
        return "does nothing"
    better = all(
        of(summary, name) > of(graddiff, name) for name in ("forget_quality", "model_utility")
    )
    return "better than GradDiff" if better else ""


def page(rows: Sequence[tuple[Method, tuple[str, ...], Sequence[Result], int]],
         target: Sequence[Result], gold: Sequence[Result]) -> str:  # fmt: skip
    """``docs/methods.md``."""
    before, ideal = means(target), means(gold)
    summaries = {method.name: means(results) for method, _, results, _ in rows}
    graddiff = summaries.get("GradDiff", {})
    headings = ["method", *(heading for heading, _ in COLUMNS.values()), "CPU s", "MB", ""]
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]

    def line(name: str, results: Sequence[Result], note: str) -> str:
        summary = means(results)
        cells = [number(summary.get(x), digits) for x, (_, digits) in COLUMNS.items()]
        cells += [f"{fmean(r.seconds for r in results):.0f}",
                  f"{max(r.peak for r in results) / 1e6:.0f}", note]  # fmt: skip
        return "| " + " | ".join([name, *cells]) + " |"

    lines += [line("*target*", target, ""), line("*gold*", gold, "")]
    ordered = sorted(rows, key=lambda row: -mean_score(row[2], target))
    for method, _, results, _ in ordered:
        note = verdict(summaries[method.name], before, ideal, graddiff)
        lines.append(
            line(f"[{method.name}](#{method.name.lower().replace('+', '')})", results, note)
        )
    sections = [
        f"### {method.name}\n\n{method.about} *{method.paper}*\n\n"
        f"`{' '.join(shown(method, trial))}` (best of {max(1, trials)} trials)"
        for method, trial, _, trials in rows
    ]
    text = (HERE / "methods_page.md").read_text("utf-8")
    held = (HERE / "results" / "methods_held.md").read_text("utf-8").strip()
    parts = {"{table}": "\n".join(lines), "{held}": held, "{methods}": "\n\n".join(sections)}
    for mark, part in parts.items():
        text = text.replace(mark, part)
    return text


def shown(method: Method, trial: Sequence[str]) -> list[str]:
    """The overrides to type for a method at this setting."""
    others = alternates_override(Path("FILE")) if method.alternates else []
    return [*method.fixed, *trial, *others]


def mean_score(results: Sequence[Result], target: Sequence[Result]) -> float:
    """The mean of the search's criterion over seeds."""
    return fmean(score(result, before) for result, before in zip(results, target, strict=True))


def number(value: float | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:.0e}" if 0 < abs(value) < 10**-digits and digits else f"{value:.{digits}f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Every method on the embedded benchmark.")
    parser.add_argument(
        "--only", default="", help="methods, separated by commas; GradDiff comes along"
    )
    parser.add_argument("--folder", type=Path, default=Path("saves/methods"))
    parser.add_argument(
        "--page", type=Path, help="where the page goes; docs/methods.md if all methods ran"
    )
    parser.add_argument("--workers", type=int, default=max(1, min(8, os.cpu_count() or 1)))
    args = parser.parse_args(argv)
    only = [name for name in args.only.split(",") if name]
    try:
        methods = read_methods(HERE / "methods.yaml", [*only, "GradDiff"] if only else [])
    except InputError as error:
        parser.error(str(error))
    bench = Benchmark(args.folder, args.workers)
    alternates = any(method.alternates for method in methods)
    prepared = bench.prepare([SEARCH_SEED, *SEEDS], alternates=alternates)
    searched = prepared[SEARCH_SEED][0]
    trials = {
        method.name: [
            (trial, bench.unlearning(method, trial, i, SEARCH_SEED))
            for i, trial in enumerate(method.trials)
        ]
        for method in methods
    }
    bench.run([stage for stages in trials.values() for _, stage in stages])
    chosen = {
        name: max(stages, key=lambda pair: score(bench.results[pair[1]], searched))[0]
        for name, stages in trials.items()
    }
    final = {
        (method.name, seed): bench.unlearning(method, chosen[method.name], 0, seed)
        for method in methods
        for seed in SEEDS
    }
    bench.run(list(final.values()))
    rows = [
        (method, chosen[method.name],
         [bench.results[final[method.name, seed]] for seed in SEEDS], len(trials[method.name]))
        for method in methods
    ]  # fmt: skip
    text = page(rows, [prepared[s][0] for s in SEEDS], [prepared[s][1] for s in SEEDS])
    target = args.page or (
        args.folder / "methods.md" if only else HERE.parent / "docs" / "methods.md"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, "utf-8")
    print(f"{text.split('## ')[1] if '## ' in text else text}\nwritten: {target}")


if __name__ == "__main__":
    main()
