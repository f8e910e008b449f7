"""The adapter of the documented commands beside a small one and full fine-tuning, on one target.

python benchmarks/adapters.py TARGET forget.jsonl retain.jsonl --steps 20 --methods NPO,GradDiff

Each case makes TARGET (a run folder, a model folder) forget, 4 forget and 4 retain rows a step, at
a learning rate of its own kind, in a process of its own. Every quarter of the way it is asked for
the probability of all rows, so that cases can be compared where they have forgotten as much. Time
is the median CPU time of a step on one thread; memory is the highest resident memory of the
training above that before it, when all libraries are imported, with the system's own allocator. To
serve a run takes the root's weights and what `size` says.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))

from memory import memory_now, memory_peak

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
QUARTERS = 4
SEVEN = "[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"
R_16 = [
    *("model.lora_config.r=16", "model.lora_config.lora_alpha=32"),
    *("model.lora_config.lora_dropout=0", f"model.lora_config.target_modules={SEVEN}"),
]
# what is trained -> its overrides; the first is experiment=unlearn/tofu/lora as it is shipped
CASES = {
    "r 128 with lm_head at 1e-4": ["trainer.args.learning_rate=1e-4"],
    "r 16 at 1e-3": ["trainer.args.learning_rate=1e-3", *R_16],
    "r 16 at 3e-4": ["trainer.args.learning_rate=3e-4", *R_16],
    "all weights at 5e-5": ["trainer.args.learning_rate=5e-5", "model.use_lora=false"],
}
FIGURES = ("forget_Q_A_Prob", "retain_Q_A_Prob")
SUITE = yaml.safe_load((ROOT / "configs/metrics/own.yaml").read_text("utf-8"))["default"]
ASKED = ["eval.own.panel=[forget_Q_A_Prob]"]
ASKED += [f"~eval.own.metrics.{metric}" for metric in SUITE if metric not in FIGURES]


def child(case: str, method: str, options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Train one case, and ask it every quarter of the way."""
    import torch

    from unlora import evaluate, unlearn
    from unlora.trainer.trainer import UnlearningTrainer

    marks: list[float] = []
    step = UnlearningTrainer.training_step

    def timed(*args: Any, **kwargs: Any) -> Any:
        if not marks:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        marks.append(time.process_time())
        return step(*args, **kwargs)

    UnlearningTrainer.training_step = timed
    torch.set_num_threads(int(ENVIRONMENT["OMP_NUM_THREADS"]))
    before = memory_now()
    words = [*CASES[case], "model.model_args.torch_dtype=float32", "evaluate=false",
             f"trainer.args.max_steps={options.steps}", "trainer.score_forget_end=false",
             "trainer.args.per_device_train_batch_size=4",
             "trainer.args.gradient_accumulation_steps=1", "trainer.args.save_strategy=steps",
             f"trainer.args.save_steps={options.steps // QUARTERS}",
             "trainer.args.save_only_model=true"]  # fmt: skip
    run = unlearn(options.target, options.forget, options.retain, method=method,
                  output_dir=Path(folder) / "run", overrides=words)  # fmt: skip
    peak = memory_peak() - before
    weights = max(run.folder.glob("*model.safetensors"), key=lambda file: file.stat().st_size)
    figures: dict[str, Any] = {
        "CPU s a step": statistics.median(late - early for early, late in pairwise(marks)),
        "peak MB": peak / 1e6,
        "size MB": weights.stat().st_size / 1e6,
    }
    for quarter in range(1, QUARTERS + 1):
        steps = quarter * (options.steps // QUARTERS)
        model = run.folder / f"checkpoint-{steps}"
        values = evaluate(model, options.forget, options.retain, overrides=ASKED)
        figures[f"step {steps}"] = " / ".join(f"{values[name]:.3f}" for name in FIGURES)
    return figures


def main() -> None:
    """Print a table of all cases: forget / retain probability after each quarter."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("forget")
    parser.add_argument("retain")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--methods", default="NPO", help="separated by commas")
    parser.add_argument("--only", choices=CASES, help="one case, in this process; prints JSON")
    options = parser.parse_args()
    if options.steps < QUARTERS or options.steps % QUARTERS:
        parser.error(f"--steps is {options.steps}; give a multiple of {QUARTERS}")
    for name in ("target", "forget", "retain"):
        if not Path(getattr(options, name)).exists():
            parser.error(f"{name} {getattr(options, name)!r} is not there")
    if options.only:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(child(options.only, options.methods, options, folder)))
        return
    first = True
    for method in options.methods.split(","):
        for case in CASES:
            command = [sys.executable, __file__, *sys.argv[1:], "--methods", method]
            done = subprocess.run(
                [*command, "--only", case],
                env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode:
                sys.exit(f"{method}, {case}: {done.stderr}")
            values = json.loads(done.stdout.splitlines()[-1])
            if first:
                print("| | " + " | ".join(values) + " |\n" + "|---" * (len(values) + 1) + "|")
                first = False
            cells = (f"{v:.3g}" if isinstance(v, float) else v for v in values.values())
            print(f"| {method}, {case} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
