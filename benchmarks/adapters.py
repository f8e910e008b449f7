"""The adapter of the documented commands beside a small one and full fine-tuning, on one target.

python benchmarks/adapters.py TARGET forget.jsonl retain.jsonl --steps 10

Each case makes TARGET (a run folder, a model folder) forget by NPO, 4 forget and 4 retain rows a
step, at a learning rate of its own kind, in a process of its own. Then it is asked for the
probability of all rows. Time is CPU time of a step, the first one left out (it is slower, and so is
nothing after it); memory is the highest resident memory of the training above that before it, when
all libraries are imported. To serve a run takes the root's weights and what `size` says.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))

from memory import ENVIRONMENT, memory_now, memory_peak

ROOT = Path(__file__).parents[1]
SEVEN = "[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"
# what is trained -> its overrides; the first is experiment=unlearn/tofu/lora as it is shipped
CASES = {
    "r 128, lm_head": ["trainer.args.learning_rate=1e-4"],
    "r 16": [
        "trainer.args.learning_rate=1e-3",
        *("model.lora_config.r=16", "model.lora_config.lora_alpha=32"),
        *("model.lora_config.lora_dropout=0", f"model.lora_config.target_modules={SEVEN}"),
    ],
    "all weights": ["trainer.args.learning_rate=1e-5", "model.use_lora=false"],
}
FIGURES = ("forget_Q_A_Prob", "retain_Q_A_Prob")
SUITE = yaml.safe_load((ROOT / "configs/metrics/own.yaml").read_text("utf-8"))["default"]
ASKED = ["eval.own.panel=[forget_Q_A_Prob]"]
ASKED += [f"~eval.own.metrics.{metric}" for metric in SUITE if metric not in FIGURES]


def child(case: str, options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Train and ask one case."""
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
             "trainer.args.gradient_accumulation_steps=1"]  # fmt: skip
    run = unlearn(options.target, options.forget, options.retain, method="NPO",
                  output_dir=Path(folder) / "run", overrides=words)  # fmt: skip
    peak = memory_peak() - before
    values = evaluate(run, options.forget, options.retain, overrides=ASKED)
    weights = max(run.folder.glob("*model.safetensors"), key=lambda file: file.stat().st_size)
    return {
        "CPU s a step": (marks[-1] - marks[1]) / (len(marks) - 2),
        "peak MB": peak / 1e6,
        "size MB": weights.stat().st_size / 1e6,
        **{name: values[name] for name in FIGURES},
    }


def main() -> None:
    """Print one line for each case, and one for the target."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("forget")
    parser.add_argument("retain")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", choices=CASES, help="one case, in this process; prints JSON")
    options = parser.parse_args()
    if options.steps < 3:
        parser.error(f"--steps is {options.steps}; the first step is not timed, so give 3 or more")
    for name in ("target", "forget", "retain"):
        if not Path(getattr(options, name)).exists():
            parser.error(f"{name} {getattr(options, name)!r} is not there")
    if options.only:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(child(options.only, options, folder)))
        return
    for case in CASES:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", case]
        done = subprocess.run(
            command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{case}: {done.stderr}")
        values = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{case:16}", *(f"{name} {value:.3f}  " for name, value in values.items()), flush=True
        )


if __name__ == "__main__":
    main()
