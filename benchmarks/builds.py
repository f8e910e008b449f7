"""Training on a real model through the user's own command, beside an earlier build of the program.

git worktree add ../earlier 1920345
python benchmarks/builds.py --model FOLDER --against ../earlier
python benchmarks/builds.py --model FOLDER --against ../earlier --work NPO-r16 --dropout 0

FOLDER is a model as ``save_pretrained`` writes it, or UNLORA_REAL_MODEL names it; the figures of
docs/performance.md are of SmolLM2-135M-Instruct. A step is 4 forget and 4 retain rows of TOFU (4
rows of fine-tuning), LoRA on the seven linear layers, float32, dropout 0.05, no gradient
checkpointing. With --dropout 0 both must have the same losses.

Each build is a process of its own; they take turns, step by step, and the first step of each does
not count. Time is CPU seconds of the process, a ratio the median of those of pairs of steps. Memory
is the highest resident memory since the imports, with the allocator that a user has.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from evaluation_rows import realdata
from sides import Found, Side, say

HERE = Path(__file__).parent
ROWS = 16
TARGETS = "[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"
WORK = {
    "NPO-r16": ("unlearn", 16, ["trainer=NPO", "~eval.own"]),
    "GradDiff-r16": ("unlearn", 16, ["trainer=GradDiff", "~eval.own"]),
    "SimNPO-r16": ("unlearn", 16, ["trainer=SimNPO", "~eval.own"]),
    "NPO-r128": ("unlearn", 128, ["trainer=NPO", "~eval.own"]),
    "finetune-r16": ("train", 16, []),
}
QUIET = {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


# --- in the process of one build -----------------------------------------------------------------


def child(options: argparse.Namespace) -> None:
    """Train by the command of the build on the path, a step whenever a line comes in."""
    import runpy

    import torch
    from transformers import TrainerCallback, trainer

    torch.set_num_threads(options.threads)

    class Turns(TrainerCallback):
        """Waits before every step until it is told to go."""

        loss = float("nan")

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.wait()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.seconds = time.process_time() - self.started
            control.should_log = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
            if "loss" in logs:
                say({"seconds": self.seconds, "loss": logs["loss"], "memory": peak() - before})
                self.wait()

        def wait(self) -> None:
            if sys.stdin.readline().strip() != "step":
                os._exit(0)  # the run is of no use
            self.started = time.process_time()

    trainer.DEFAULT_CALLBACKS.append(Turns)
    Path("/proc/self/clear_refs").write_text("5", "utf-8")
    before = peak()
    sys.argv = ["unlora", *options.child]
    runpy.run_module("unlora", run_name="__main__")


def peak() -> int:
    """The highest resident memory in bytes since it was last forgotten."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


# --- in the process that starts the others -------------------------------------------------------


@contextmanager
def package(build: Path) -> Iterator[str]:
    """A folder that holds a checkout as the package ``unlora``."""
    with tempfile.TemporaryDirectory() as folder:
        inside = Path(folder) / "unlora"
        inside.mkdir()
        for path in [*(build / "src").iterdir(), build / "configs"]:
            (inside / path.name).symlink_to(path.resolve())
        yield folder


def command(work: str, folder: Path, options: argparse.Namespace) -> list[str]:
    """The user's command; it ends after as many steps as are measured."""
    kind, rank, more = WORK[work]
    data = ["forget", "retain"] if kind == "unlearn" else ["train"]
    experiment = "finetune" if kind == "train" else kind
    return [
        kind, f"experiment={experiment}/own/lora", f"model={options.model}", *more,
        *(f"data.{part}={folder / part}.jsonl" for part in data),
        f"task_name={work}", "model.model_args.torch_dtype=float32",
        f"model.lora_config.r={rank}", f"model.lora_config.lora_alpha={2 * rank}",
        f"model.lora_config.lora_dropout={options.dropout}",
        f"model.lora_config.target_modules={TARGETS}",
        "trainer.args.per_device_train_batch_size=4", "trainer.args.gradient_accumulation_steps=1",
        "trainer.args.gradient_checkpointing=false", "trainer.args.warmup_epochs=0",
        f"trainer.args.max_steps={options.steps + 1}",
    ]  # fmt: skip


def compared(work: str, packages: dict[str, str], folder: Path, options: Any) -> Found:
    """Both builds on one piece of work, in turns."""
    steps: dict[str, list[Found]] = {name: [] for name in packages}
    with ExitStack() as stack:
        sides = {}
        for name, path in packages.items():
            runs = folder / name / work
            runs.mkdir(parents=True)
            arguments = [f"--threads={options.threads}", "--child"]
            arguments += [*command(work, folder, options), f"paths.output_dir={runs}"]
            environment = os.environ | QUIET | {"PYTHONPATH": path, "UNLORA_CACHE": str(runs)}
            environment["OMP_NUM_THREADS"] = str(options.threads)
            sides[name] = stack.enter_context(Side(__file__, arguments, environment))
        for _ in range(options.steps + 1):
            for name, side in sides.items():
                steps[name].append(side.tell("step"))
    seconds = {name: [step["seconds"] for step in made[1:]] for name, made in steps.items()}
    losses = [[step["loss"] for step in made] for made in steps.values()]
    peaks = {name: max(step["memory"] for step in made) for name, made in steps.items()}
    pairs = list(zip(*seconds.values(), strict=True))
    return {
        "work": work, "seconds": {name: statistics.median(x) for name, x in seconds.items()},
        "faster": statistics.median(earlier / now for now, earlier in pairs),
        "memory": peaks, "memory_share": peaks["now"] / peaks["earlier"],
        "difference": max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True)),
        "dropout": options.dropout, "versions": versions(), "threads": options.threads,
    }  # fmt: skip


def versions() -> str:
    names = ("torch", "transformers", "peft")
    return ", ".join(f"{name} {metadata.version(name)}" for name in names)


def line(found: Found) -> str:
    text = (
        f"{found['work']:12} now {found['seconds']['now']:6.2f} s  faster {found['faster']:5.2f} x"
    )
    text += f"  peak {found['memory']['now'] / 1e6:6.0f} MB  {found['memory_share']:5.2f} x"
    return text + ("" if found["dropout"] else f"  loss differs by {found['difference']:.1e}")


def write_rows(folder: Path) -> None:
    """TOFU's first rows as files of questions and answers."""
    source = realdata()
    if source is None:
        sys.exit("The rows of TOFU are not here. Set UNLORA_REALDATA to the folder that has tofu/.")
    for part, name in {"forget": "forget10", "retain": "retain90", "train": "retain90"}.items():
        rows = (source / "tofu" / f"{name}.json").read_text("utf-8").splitlines()
        (folder / f"{part}.jsonl").write_text("\n".join(rows[:ROWS]), "utf-8")


def main() -> None:
    """Measure each piece of work, print a line for it, and write them all."""
    options = parsed()
    if options.child:
        child(options)
        return
    results = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        write_rows(folder)
        builds = {"now": HERE.parent, "earlier": Path(options.against).resolve()}
        packages = {name: stack.enter_context(package(build)) for name, build in builds.items()}
        for work in options.work.split(","):
            results.append(compared(work, packages, folder, options))
            print(line(results[-1]), flush=True)
    if options.output:
        Path(options.output).write_text(json.dumps(results, indent=1) + "\n", "utf-8")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=os.environ.get("UNLORA_REAL_MODEL"))
    parser.add_argument("--against", help="the folder of another checkout")
    parser.add_argument("--work", default=",".join(WORK), help=f"of {', '.join(WORK)}")
    parser.add_argument("--steps", type=int, default=3, help="pairs that count")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", help="a JSON file")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.child:
        if not options.model or not Path(options.model, "config.json").is_file():
            sys.exit(
                f"There is no model in {options.model!r}. Give --model FOLDER or set "
                "UNLORA_REAL_MODEL; the page is of SmolLM2-135M-Instruct."
            )
        if not options.against or not Path(options.against, "src").is_dir():
            sys.exit("Give --against FOLDER of another checkout: git worktree add FOLDER COMMIT.")
        options.model = Path(options.model).resolve()
        if unknown := set(options.work.split(",")) - set(WORK):
            parser.error(f"There is no work {', '.join(unknown)}. Known: {', '.join(WORK)}.")
    return options


if __name__ == "__main__":
    main()
