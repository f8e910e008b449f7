"""The whole TOFU evaluation, beside one that asks the model anew for every metric.

make bench-eval                        or: python benchmarks/evaluate.py: 150 rows of each set
python benchmarks/evaluate.py --rows 10            in two minutes
python benchmarks/evaluate.py --rows 0             all rows, in half an hour

Both evaluate one model on the same rows, from text to figures: ours every metric of
``configs/metrics/tofu.yaml`` that this model allows, the baseline those of them that it knows.
``baseline_evaluation.py`` is how frameworks evaluate today; ``--metrics published`` leaves out the
one attack of its list that they do not have, ReCaLL; ``--metrics default`` are those of
``experiment=eval/tofu/default``. Wanted: at least 4 times as fast, at most half
of the memory, equal figures; and at most 3 s for a second ``unlora eval`` of the same model.

The rows are TOFU's, found through the environment variable UNLORA_REALDATA or in
../shared/realdata; where they are not, random words take their place, in rows of like length. The
model is a random Qwen2 of 4 layers with the vocabulary of Qwen2.5, which has learnt the rows a
little, so that there is something to measure. It never ends an answer, so ``--new-tokens`` is what
it writes; a real run writes up to 200.

Each side is a process of its own, and they take turns. An evaluation of two rows comes first, so
that what is loaded at first use does not count; nothing is kept from one evaluation to the next.
Memory is the resident memory at its highest, minus that before. The baseline has the batch size
that suits it best here.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from evaluation_rows import SIZES, prepare, realdata, template_args
from sides import Found, Side, say

FASTER, LEANER, EQUAL, CACHED = 4.0, 0.5, 1e-4, 3.0
PACKAGES = ("unlora", "torch", "transformers", "tokenizers")
OPTIONS = ("rows", "new-tokens", "batch-size", "threads", "metrics")  # that a child is told
RESULTS = Path(__file__).parent / "results" / "evaluate.json"
Evaluation = Callable[[], dict[str, float]]


# --- in the process of one measurement -----------------------------------------------------------


def child(side: str, folder: Path, options: argparse.Namespace) -> Iterator[Found]:
    """Measurements of ``ours`` or ``baseline``, or one of ``cached`` or ``products``."""
    import logging

    import torch

    torch.set_num_threads(options.threads)
    if side == "cached":
        yield {"seconds": cached_run(folder, options)}
        return
    logging.disable(logging.WARNING)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    prepared = baseline if side == "baseline" else ours
    two, everything = (
        prepared(model, tokenizer, folder / rows, options) for rows in ("two", "all")
    )
    two()
    if side == "products":
        yield {"seconds": seconds_of_products(model, everything)}
        return
    of_passes = timed_passes() if side == "ours" else {}
    before = memory("VmRSS")
    while True:
        of_passes.clear()
        started = time.perf_counter()
        summary = everything()
        seconds = time.perf_counter() - started
        highest = memory("VmHWM") - before
        yield {"seconds": seconds, "memory": highest, "summary": summary, "passes": {**of_passes}}


def seconds_of_products(model: Any, evaluation: Evaluation) -> float:
    """What its matrix products would take, but for those of attention, at this machine's rate."""
    from torch.utils.flop_counter import FlopCounterMode
    from training import Size, multiply_rate

    with FlopCounterMode(display=False) as counter:
        evaluation()
    config = model.config
    shape = Size(config.hidden_size, config.intermediate_size, 1, 1, 1, config.vocab_size, "")
    options = argparse.Namespace(threads=0, device="cpu", dtype="float32")
    rates = [multiply_rate(shape, options) for _ in range(5)]
    return counter.get_total_flops() / statistics.median(rates)


def timed_passes() -> dict[str, float]:
    """What is to hold the seconds of each pass of ours."""
    from unlora.evals.runner import PassRunner

    seconds: dict[str, float] = {}
    ask = PassRunner._run

    def asked(self: PassRunner, name: str, data: Sequence[str]) -> Any:
        begin = time.perf_counter()
        found = ask(self, name, data)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begin
        return found

    PassRunner._run = asked  # type: ignore[method-assign]
    return seconds


def ours(model: Any, tokenizer: Any, folder: Path, options: argparse.Namespace) -> Evaluation:
    """The suite as it is shipped, with every metric."""
    from omegaconf import OmegaConf

    from unlora.evals import build_suites

    config: Any = OmegaConf.to_container(composed(folder, options).eval, resolve=True)
    template = template_args(tokenizer)

    def evaluate() -> dict[str, float]:
        (suite,) = build_suites(config, tokenizer=tokenizer, template_args=template)
        return dict(suite.evaluate(model, folder / "ours"))

    return evaluate


def baseline(model: Any, tokenizer: Any, folder: Path, options: argparse.Namespace) -> Evaluation:
    """The metrics that the other side knows, each by itself."""
    from baseline_evaluation import Baseline

    log = folder / "retain" / "TOFU_EVAL.json"
    names = list(composed(folder, options).eval.tofu.metrics)

    def evaluate() -> dict[str, float]:
        run = Baseline(  # anew, as it remembers what it has computed
            model,
            tokenizer,
            folder / "TOFU",
            json.loads(log.read_text("utf-8")) if log.is_file() else {},
            system_prompt=template_args(tokenizer).get("system_prompt"),
            batch_size=options.batch_size,
            max_new_tokens=options.new_tokens,
        )
        return run.summary(names)

    return evaluate


def metric_names(options: argparse.Namespace) -> list[str]:
    """The metrics that are asked for, of those that there are."""
    from unlora.config.metrics import shipped_metrics

    names = sorted(shipped_metrics("tofu"))
    return [name for name in names if options.metrics == "all" or "mia_recall" not in name]


def composed(folder: Path, options: argparse.Namespace) -> Any:
    """The config of ``unlora eval`` for these rows, this model and these metrics."""
    from unlora.cli import compose

    given = [
        "experiment=eval/tofu/default",
        "model=Qwen2.5-0.5B-Instruct",
        "model.model_args.torch_dtype=float32",
        f"model.model_args.pretrained_model_name_or_path={folder.parent / 'model'}",
        f"model.tokenizer_args.pretrained_model_name_or_path={folder.parent / 'model'}",
        f"paths.output_dir={folder / 'run'}",
        f"eval.tofu.path={folder / 'TOFU'}",
        f"eval.tofu.max_new_tokens={options.new_tokens}",
    ]
    shipped = compose.composed("eval", given).eval.tofu
    wanted = list(shipped.metrics) if options.metrics == "default" else metric_names(options)
    if more := [name for name in wanted if name not in shipped.metrics]:
        given += [f"+eval/tofu_metrics=[{','.join(more)}]"]
    given += [f"~eval.tofu.metrics.{name}" for name in shipped.metrics if name not in wanted]
    for name in ("retain", "target"):
        log = folder / name / "TOFU_EVAL.json"
        if f"{name}_logs_path" in shipped and log.is_file():
            given.append(f"eval.tofu.{name}_logs_path={log}")
    return compose.composed("eval", given)


def cached_run(folder: Path, options: argparse.Namespace) -> float:
    """Seconds of ``unlora eval`` after its imports."""
    import logging

    import unlora.config
    import unlora.evals
    import unlora.model
    import unlora.model.guards  # noqa: F401
    from unlora.recipes.evaluate import run

    logging.disable(logging.WARNING)
    cfg = composed(folder / "all", options)
    started = time.perf_counter()
    run(cfg)
    return time.perf_counter() - started


def memory(field: str) -> int:
    """Bytes, as the system counts them for this process: ``VmRSS`` now, ``VmHWM`` at most."""
    # the peak that getrusage gives is not below that of the process which started this one
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


# --- in the process that starts the others -------------------------------------------------------


def differences(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """Relative difference of every metric that both have; of what is nearly 0, the absolute one."""
    found = {}
    for name in sorted(one.keys() & other.keys()):
        a, b = one[name], other[name]
        both_nan = a != a and b != b
        found[name] = 0.0 if both_nan else abs(a - b) / max(abs(a), abs(b), 1e-2)
    return found


def figures(found: Mapping[str, Sequence[Found]]) -> list[Found]:
    """What was measured: ``figure``, ``value``, ``target``, ``met``."""
    seconds = {side: statistics.median(one["seconds"] for one in found[side]) for side in found}
    needed = {
        side: found[side][0]["memory"]  # of the first: before it nothing was as high
        for side in ("ours", "baseline")
    }
    gaps = differences(found["ours"][0]["summary"], found["baseline"][0]["summary"])
    worst = max(gaps, key=lambda name: _nan_first(gaps[name]))
    # of each pair, so that a machine that is busy for a while slows both
    pairs = zip(found["ours"], found["baseline"], strict=True)
    speed = statistics.median(other["seconds"] / ours["seconds"] for ours, other in pairs)
    share = needed["ours"] / needed["baseline"]
    passes = [one["passes"] for one in found["ours"]]
    of_each = {name: statistics.median(one[name] for one in passes) for name in passes[0]}
    rows = [
        ("seconds, ours", seconds["ours"], None, None),
        *((f"seconds, ours, {name}", of_each[name], None, None) for name in of_each),
        ("seconds, ours, matrix products alone", seconds["products"], None, None),
        ("seconds, baseline", seconds["baseline"], None, None),
        ("times as fast", speed, FASTER, speed >= FASTER),
        ("peak MB, ours", needed["ours"] / 1e6, None, None),
        ("peak MB, baseline", needed["baseline"] / 1e6, None, None),
        ("share of the memory", share, LEANER, share <= LEANER),
        (f"largest relative difference ({worst})", gaps[worst], EQUAL, gaps[worst] <= EQUAL),
    ]
    if "cached" in found:
        first, second = (one["seconds"] for one in found["cached"])
        rows += [
            ("seconds, unlora eval", first, None, None),
            ("seconds, unlora eval again", second, CACHED, second <= CACHED),
        ]
    return [dict(zip(("figure", "value", "target", "met"), row, strict=True)) for row in rows]


def _nan_first(gap: float) -> float:
    return gap if gap == gap else float("inf")


def table(rows: Sequence[Found]) -> str:
    """The same for a terminal."""
    signs = {"times as fast": "at least"}
    lines = []
    for row in rows:
        value = f"{row['value']:.3g}" if row["value"] < 100 else f"{row['value']:.0f}"
        line = f"{row['figure']:<60}{value:>10}"
        if row["target"] is not None:
            sign = signs.get(row["figure"], "at most")
            line += f"   {sign} {row['target']:g}: {'ok' if row['met'] else 'MISSED'}"
        lines.append(line)
    return "\n".join(lines)


def start_side(side: str, folder: Path, options: argparse.Namespace) -> Side:
    """A process that measures whenever it is told to."""
    given = [f"--{name}={getattr(options, name.replace('-', '_'))}" for name in OPTIONS]
    threads = str(options.threads)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "UNLORA_CACHE": str(folder / "cache"),
    }
    return Side(__file__, ["--child", side, "--folder", str(folder), *given], environment)


def told(side: str, found: Found) -> Found:
    print(f"{side}: {found['seconds']:.1f} s", file=sys.stderr, flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns 1 where a target is missed."""
    options = options_of(argv)
    if options.child:
        measurements = child(options.child, options.folder, options)
        for _told in sys.stdin:
            say(next(measurements))
        return 0
    source = None if options.made_up else realdata()
    if source is None:
        print("no real rows (set UNLORA_REALDATA): random words, like TOFU's rows in length")
    found: dict[str, list[Found]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder, SIZES[options.size], options.rows or None, source)
        names = ("ours", "baseline")
        with (
            start_side("ours", folder, options) as one,
            start_side("baseline", folder, options) as other,
        ):
            for name, side in [*zip(names, (one, other), strict=True)] * options.repeats:
                found.setdefault(name, []).append(told(name, side.tell("again")))
        with start_side("products", folder, options) as side:
            found["products"] = [told("products", side.tell("once"))]
        for _ in range(2 if options.cached else 0):
            with start_side("cached", folder, options) as side:
                found.setdefault("cached", []).append(told("cached", side.tell("once")))
    rows, about = figures(found), description(options, "TOFU" if source else "made-up")
    print(f"{about['workload']}\n{about['machine']}\n{table(rows)}")
    one, other = (set(found[side][0]["summary"]) for side in ("ours", "baseline"))
    print(f"{len(one & other)} metrics compared")
    for side, names in (("ours", one - other), ("the baseline", other - one)):
        print(f"only {side}: {', '.join(sorted(names)) or 'none'}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    # JSON knows no NaN
    report = [
        {**row, "value": row["value"] if row["value"] == row["value"] else None, **about}
        for row in rows
    ]
    options.output.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return int(any(row["met"] is False for row in rows))


def description(options: argparse.Namespace, data: str) -> dict[str, str]:
    """What was measured, how, and on what; no names."""
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in PACKAGES)
    chosen = [f"--{name} {getattr(options, name.replace('-', '_'))}" for name in OPTIONS]
    chosen += [f"--size {options.size}", f"--repeats {options.repeats}"]
    return {
        "workload": f"{data} forget10, {options.rows or 'all'} rows a set, {options.size}, "
        f"{options.new_tokens} new tokens, {options.metrics} metrics",
        "command": " ".join(["python benchmarks/evaluate.py", *chosen]),
        "machine": f"{options.threads} CPU cores ({platform.machine()}), "
        f"Python {platform.python_version()}, {versions}",
    }


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=150, help="of each set; 0: all")
    parser.add_argument("--new-tokens", type=int, default=32, help="of a generation")
    parser.add_argument("--batch-size", type=int, default=8, help="of the baseline")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1, help="measurements of each side")
    parser.add_argument("--metrics", choices=("all", "published", "default"), default="all")
    parser.add_argument("--size", choices=SIZES, default="S151")
    parser.add_argument("--made-up", action="store_true", help="rows of random words")
    parser.add_argument("--no-cached", dest="cached", action="store_false")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
