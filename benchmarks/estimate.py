"""How far the estimate of ``unlora doctor`` is from the peak of real trainings on this machine.

python benchmarks/estimate.py

Every case trains for three steps in a process of its own, on the rows of the embedded benchmark.
Its peak is the resident memory (VmHWM) minus that before the training, when all libraries are
imported and have been used on a small model. Blocks that are freed go back to the system at once,
see ``ALLOCATOR`` in memory.py.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from memory import ENVIRONMENT, SIZES, memory_now, memory_peak

COMMON = (
    *("trainer.args.max_steps=3", "trainer.args.disable_tqdm=true", "task_name=measured"),
    *("trainer.args.gradient_accumulation_steps=1", "trainer.args.logging_steps=1"),
)
MIDDLE = (*COMMON, "trainer.args.per_device_train_batch_size=16")
# name -> primary config, whether on the model of memory.py and not the small one, overrides
CASES: dict[str, tuple[str, bool, tuple[str, ...]]] = {
    "pocket, LoRA": ("train", False, ("experiment=finetune/pocket/lora", *COMMON)),
    "pocket, LoRA, 64 rows": (
        "train",
        False,
        (
            "experiment=finetune/pocket/lora",
            *COMMON,
            "trainer.args.per_device_train_batch_size=64",
        ),
    ),
    "84M, LoRA, NPO": ("unlearn", True, ("experiment=unlearn/pocket/lora", "trainer=NPO", *MIDDLE)),
    "84M, LoRA, NPO, checkpoints": (
        "unlearn",
        True,
        (
            "experiment=unlearn/pocket/lora",
            "trainer=NPO",
            *MIDDLE,
            "trainer.args.gradient_checkpointing=true",
        ),
    ),
    "84M, in full, KL": (
        "unlearn",
        True,
        (
            "experiment=unlearn/pocket/default",
            "trainer=GradDiff",
            "trainer.method_args.retain_loss_type=KL",
            *MIDDLE,
        ),
    ),
}


def config_of(primary: str, overrides: list[str]) -> Any:
    """The checked and the composed config, with no evaluation at the end."""
    from omegaconf import open_dict

    from unlora.cli import compose
    from unlora.cli.overrides import normalised
    from unlora.config import read

    cfg = compose.composed(primary, normalised(overrides))
    with open_dict(cfg):
        cfg.eval = {}
    return read(cfg), cfg


def child(name: str, folder: str) -> None:
    """Print the estimate and the peak of one case as JSON."""
    import torch

    from unlora.recipes import train
    from unlora.trainer.memory_estimate import estimate

    torch.set_num_threads(1)
    primary, large, overrides = CASES[name]
    words = [*overrides, f"paths.output_dir={folder}/out"]
    if large:
        words.append(f"model={folder}/model")
    config, cfg = config_of(primary, words)
    found = estimate(config)
    small = ["experiment=finetune/pocket/lora", *COMMON, f"paths.output_dir={folder}/first"]
    train.run(config_of("train", [*small, "trainer.args.per_device_train_batch_size=1"])[1])
    before = memory_now()
    if not torch.cuda.is_available():
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    train.run(cfg)
    parts = {part: size for part, size in found.parts.items() if size}
    peak = memory_peak() - before
    print(json.dumps({"estimate": found.total_bytes, "peak": peak, "parts": parts}))


def make_model(folder: Path) -> None:
    """The random Llama of memory.py with the tokenizer of the embedded benchmark."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from unlora.data.pocket import base_model

    size = SIZES["default"]
    shape = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_model()).save_pretrained(folder)


def main() -> None:
    """Print one line for each case."""
    if len(sys.argv) > 1:
        child(sys.argv[1], sys.argv[2])
        return
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model")
        for name in CASES:
            done = subprocess.run(
                [sys.executable, __file__, name, folder],
                env={**os.environ, **ENVIRONMENT},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                sys.exit(f"{name}: {done.stderr}")
            found = json.loads(done.stdout.splitlines()[-1])
            ratio = found["estimate"] / found["peak"]
            parts = ", ".join(f"{k} {v / 1e6:.0f}" for k, v in found["parts"].items())
            print(
                f"{name:28} estimated {found['estimate'] / 1e6:6.0f} MB, peak "
                f"{found['peak'] / 1e6:6.0f} MB, ratio {ratio:.2f}   ({parts})",
                flush=True,
            )


if __name__ == "__main__":
    main()
