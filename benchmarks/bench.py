"""The figures and tables of docs/performance.md.

make bench                                   R, R-today, start and S; UNLORA_REALDATA: the real rows
make bench-more                              memory, eval, growth, steps and S-r128
make bench-gpu                               a model of Qwen2.5-3B's shape, on a GPU
python benchmarks/bench.py --only S,growth   some parts again; the others keep their figures

R is a real model, beside an earlier build: UNLORA_REAL_MODEL names its folder, UNLORA_EARLIER that
of a checkout (git worktree add ../earlier 1920345). Without them R is left out. R-today is the same
model beside how LoRA unlearning is done today.

Writes benchmarks/results/latest.json, a list of {workload, figure, value, target, met, command,
machine}, and the tables of docs/performance.md. Parts: R, R-today, S and M (one step of training),
S-r128, steps (ours without one thing each), memory, eval (all metrics on S and M, the default ones
on S), growth, start, and 3B on a GPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "latest.json", HERE.parent / "docs" / "performance.md"
FASTER = {
    "R": {"NPO": 3.3, "GradDiff": 2.4, "SimNPO": 2.6},
    "S": {"NPO": 3.0, "GradDiff": 1.9, "SimNPO": 2.6, "RMU": 5.0},
    "M": {"NPO": 2.8, "GradDiff": 1.8, "SimNPO": 2.1, "UNDIAL": 2.4, "RMU": 4.5},
}
FASTER_R128 = {"NPO": 2.6}  # size R
EARLIER = {
    "NPO-r16": 1.45, "GradDiff-r16": 1.45, "SimNPO-r16": 1.45, "NPO-r128": 1.3, "finetune-r16": 1.4,
}  # fmt: skip
OVER_FLOOR = {("M", "GradDiff"): 1.8}
MEMORY = {"NPO": 0.45, "RMU": 0.25}
MEMORY_R = {"NPO": 0.42, "GradDiff": 0.48, "SimNPO": 0.48}
EVALUATION = {("S", "all"): 6.5, ("M", "all"): 7.0, ("S", "default"): 5.5}
EVALUATED = 10  # rows of each set
WITHOUT = {  # method and words of what is left out of a step
    "known": ("NPO", "the reference asked once"),
    "packs": ("NPO", "rows packed"),
    "flat": ("NPO", "rows in one sequence, their beginning once"),
    "fused": ("NPO", "LoRA layers fused"),
    "joined": ("NPO", "parts in one pass"),
    "positions": ("NPO", "scored positions only"),
    "chunks": ("NPO", "log-probabilities in chunks"),
    "in-place": ("UNDIAL", "soft cross-entropies in place"),
    "layers": ("RMU", "layers above RMU's rest"),
    "shared": ("UNDIAL", "adapters off in place of a second model"),
}
FOR_MEMORY = ("positions", "chunks", "in-place", "shared")
LOSSES, METRICS, STARTED, LINEAR, STEEP, FLAT = 1e-4, 1e-4, 1.0, 0.99, 1.05, 1.25
SHOWN = ("CPU", "times as fast", "peak", "share", "metrics", "tokens")
Figure = dict[str, Any]


def figure(name: str, value: float, target: float | None = None, *, least: bool = False) -> Figure:
    """``least``: the target is to be reached, and not to be kept below."""
    met = None if target is None else bool(value >= target if least else value <= target)
    return {"figure": name, "value": value, "target": target, "met": met}


def training(
    size: str, *more: str, methods: str = "NPO,GradDiff,SimNPO,UNDIAL,RMU"
) -> list[Figure]:
    arguments = ["--size", size, "--methods", methods, *more]
    found, command = run("training.py", arguments)
    figures = []
    for one in found:
        method, rank = one["method"], one["rank"]
        targets = FASTER.get(size, {}) if rank == 16 else FASTER_R128 if size == "R" else {}
        wanted = targets.get(method)
        rows = [figure("seconds a step", one["seconds"]["ours"])]
        if "--memory" in more:
            rows = [figure("share of the memory", one["memory_share"], MEMORY[method])]
        else:
            rows += [
                figure("times as fast", one["faster"], wanted, least=True),
                figure("measured / floor", one["over_floor"], OVER_FLOOR.get((size, method))),
                figure("loss differs by", one["difference"], LOSSES if size != "3B" else None),
            ]
        if size == "R":
            share = MEMORY_R.get(method) if rank == 16 else None
            rows.append(figure("share of the memory", one["memory_share"], share))
        if "share_of_peak" in one:
            rows += [
                figure("tokens a second", one["tokens"] / one["seconds"]["ours"]),
                figure("peak GB", one["memory"]["ours"] / 1e9),
                figure("share of the memory", one["memory_share"]),
                figure("share of the matrix-product peak", one["share_of_peak"]),
            ]
        about = {"command": command, "machine": f"{one['machine']}, {one['versions']}"}
        figures += [{"workload": f"{size} {method} r {rank}", **row, **about} for row in rows]
    return figures


def real() -> list[Figure]:
    """A real model beside an earlier build, where both are named."""
    model, earlier = (os.environ.get(name) for name in ("UNLORA_REAL_MODEL", "UNLORA_EARLIER"))
    if not model or not earlier:
        print("R is left out: set UNLORA_REAL_MODEL to a model's folder and UNLORA_EARLIER to that "
              "of a checkout of an earlier build.")  # fmt: skip
        return []
    results, _ = run("builds.py", ["--model", model, "--against", earlier])
    figures = []
    for result in results:
        about = {
            "command": f"python benchmarks/builds.py --work {result['work']}",
            "machine": f"{machine()}, {result['threads']} thread, {result['versions']}",
        }
        rows = [
            figure("CPU seconds a step", result["seconds"]["now"]),
            figure(
                "times as fast as 1920345", result["faster"], EARLIER[result["work"]], least=True
            ),
            figure("peak MB above the imports", result["memory"]["now"] / 1e6),
            figure("share of the memory of 1920345", result["memory_share"]),
        ]
        workload = f"R {result['work'].replace('-r', ' r ')}, whole command"
        figures += [{"workload": workload, **row, **about} for row in rows]
    return figures


def real_today() -> list[Figure]:
    """A real model beside how it is trained today, where one is named; dropout as users have it."""
    if not os.environ.get("UNLORA_REAL_MODEL"):
        print("R-today is left out: set UNLORA_REAL_MODEL to a model's folder.")
        return []
    words = ["--dropout", "0.05", "--threads", "1", "--steps", "3"]
    figures = training("R", *words, methods="NPO,GradDiff,SimNPO")
    figures += training("R", *words, "--ranks", "128", methods="NPO")
    # masks differ, so losses do; --dropout 0 compares them
    return [one for one in figures if one["figure"] != "loss differs by"]


def steps() -> list[Figure]:
    """What each part of a fast step is worth: ours against ours without it."""
    figures = []
    for name, (method, words) in WITHOUT.items():
        asked = ["--size", "S", "--methods", method, "--against", name]
        rows = [
            ("times as fast as without", "faster", None),
            ("loss differs by", "difference", LOSSES),
        ]
        measured = [(asked, rows)]
        if name in FOR_MEMORY:
            memory_only = [("share of the memory without", "memory_share", None)]
            measured.append(([*asked, "--memory", "--steps", "2"], memory_only))
        for arguments, wanted in measured:
            (found,), command = run("training.py", arguments)
            about = {"command": command, "machine": f"{found['machine']}, {found['versions']}"}
            for title, key, target in wanted:
                row = figure(title, found[key], target)
                figures.append({"workload": f"S {method} r 16, {words}", **row, **about})
    return figures


def memory() -> list[Figure]:
    return training("M", "--memory", "--steps", "2", methods=",".join(MEMORY))


def evaluation() -> list[Figure]:
    figures = []
    for (size, metrics), wanted in EVALUATION.items():
        arguments = ["--rows", str(EVALUATED), "--size", size, "--metrics", metrics]
        found, command = run("evaluate.py", [*arguments, "--repeats", "5", "--no-cached"])
        by_name = {one["figure"].split(" (")[0]: one["value"] for one in found}
        products = by_name["seconds, ours, matrix products alone"]
        rows = [
            figure("times as fast", by_name["times as fast"], wanted, least=True),
            figure("seconds", by_name["seconds, ours"]),
            figure(
                "matrix products alone, share of the seconds", products / by_name["seconds, ours"]
            ),
            figure("share of the memory", by_name["share of the memory"]),
            figure("metrics differ by", by_name["largest relative difference"], METRICS),
        ]
        about = {"command": command, "machine": found[0]["machine"]}
        figures += [{"workload": f"{size} TOFU, {metrics} metrics", **row, **about} for row in rows]
    return figures


def growth() -> list[Figure]:
    found, command = run("growth.py", [])
    peaks = found["memory"]
    few, many = found["rows"][0], found["rows"][-1]
    rows = [
        figure("of the seconds a straight line explains", found["explained"], LINEAR, least=True),
        figure("seconds grow as the rows to the power of", found["power"], STEEP),
        figure(f"peak memory, {many} rows / {few}", peaks[-1] / peaks[0], FLAT),
        figure("peak memory, vocabulary x 8", found["wider_memory"] / peaks[1], FLAT),
        figure("peak memory, answers and vocabulary x 8", found["longer_memory"] / peaks[1], FLAT),
    ]
    about = {"command": command, "machine": found["machine"]}
    return [{"workload": "growth of an evaluation", **row, **about} for row in rows]


def start() -> list[Figure]:
    """Seconds until help or a mistake in a config is on the screen."""
    found = []
    cases = {
        "--help": ["--help"],
        "a config error": ["--config-name=unlearn", "experiment=unlearn/tofu/lora", "trainer.x=1"],
    }
    for name, arguments in cases.items():
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            subprocess.run([sys.executable, "src/train.py", *arguments], cwd=HERE.parent,
                           capture_output=True)  # fmt: skip
            seconds.append(time.perf_counter() - started)
        command = " ".join(["python src/train.py", *arguments])
        about = {"command": command, "machine": machine()}
        row = figure("seconds", statistics.median(seconds), STARTED)
        found.append({"workload": f"command line, {name}", **row, **about})
    return found


def machine() -> str:
    import platform

    return f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}"


PARTS: Mapping[str, Callable[[], list[Figure]]] = {
    "R": real,
    "R-today": real_today,
    "S": lambda: training("S"),
    "S-r128": lambda: training("S", "--ranks", "128", methods="NPO,GradDiff"),
    "M": lambda: training("M"),
    "steps": steps,
    "memory": memory,
    "eval": evaluation,
    "growth": growth,
    "start": start,
    "3B": lambda: training("3B", "--device", "cuda", "--dtype", "bfloat16"),
}


def run(script: str, arguments: Sequence[str]) -> tuple[Any, str]:
    """What a script of this folder writes, and its command."""
    command = f"python benchmarks/{script} {' '.join(arguments)}".strip()
    print(command, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        # a missed target is a figure like others
        subprocess.run([sys.executable, HERE / script, *arguments, "--output", output])
        if not output.is_file():
            sys.exit(f"{command} ended without figures; the others are kept.")
        return json.loads(output.read_text("utf-8")), command


# --- what is written -----------------------------------------------------------------------------


def kept(old: Sequence[Figure], new: Sequence[Figure]) -> list[Figure]:
    """The old figures, those that were measured anew in their places; a real model comes first."""
    merged = {(one["workload"], one["figure"]): one for one in old}
    merged |= {(one["workload"], one["figure"]): one for one in new}
    return sorted(merged.values(), key=lambda one: not one["workload"].startswith("R "))


def table(figures: Iterable[Figure]) -> str:
    """Markdown: the figures, then the commands and machines that made them."""
    figures = [
        one for one in figures
        if one["figure"].startswith(SHOWN) and not one["figure"].endswith("without")
    ]  # fmt: skip
    lines = ["| workload | figure | measured | target | |", "|---|---|---|---|---|"]
    about: dict[tuple[str, str], None] = {}
    for one in figures:
        about[one["command"], one["machine"]] = None
        least = one["figure"].startswith(("times", "of the seconds"))
        target = "" if one["target"] is None else f"{'≥' if least else '≤'} {one['target']:g}"
        met = {None: "", True: "met", False: "**missed**"}[one["met"]]
        value = f"{one['value']:.3g}" if one["value"] < 1000 else f"{one['value']:.0f}"
        lines.append(f"| {one['workload']} | {one['figure']} | {value} | {target} | {met} |")
    by_machine: dict[str, list[str]] = {}
    for command, where in about:
        by_machine.setdefault(where, []).append(f"`{command}`")
    for where, commands in by_machine.items():
        lines += ["", f"On {where}:", "", *(f"- {command}" for command in commands)]
    return "\n".join(lines)


def written(page: str, figures: Sequence[Figure]) -> str:
    """The page with its tables made anew, between their marks."""
    on_gpu = [one for one in figures if one["workload"].startswith("3B")]
    on_cpu = [one for one in figures if one not in on_gpu]
    for mark, chosen in (("cpu", on_cpu), ("gpu", on_gpu)):
        begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
        before, rest = page.split(begin)
        after = rest.split(end)[1]
        text = table(chosen) if chosen else "Not measured."
        page = f"{before}{begin}\n{text}\n{end}{after}"
    return page


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write; returns 0 also where a target is missed: that is in the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help=f"of {', '.join(PARTS)}", default="R,R-today,start,S")
    chosen = parser.parse_args(argv).only.split(",")
    for name in chosen:
        if name not in PARTS:
            parser.error(f"There is no part {name!r}. Parts: {', '.join(PARTS)}.")
    started = time.perf_counter()
    for name in [name for name in chosen if name]:
        figures = PARTS[name]()
        old = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else []
        merged = kept(old, figures)
        RESULTS.write_text(json.dumps(merged, indent=1) + "\n", "utf-8")
        PAGE.write_text(written(PAGE.read_text("utf-8"), merged), "utf-8")
    print(
        f"{(time.perf_counter() - started) / 60:.1f} minutes; see {PAGE.relative_to(HERE.parent)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
