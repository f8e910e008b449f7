"""Peak memory of every method under LoRA, on one model and one batch, beside gradient ascent's.

python benchmarks/memory.py --output memory.json
python benchmarks/memory.py --only NPO,RMU trainer.args.gradient_checkpointing=false plugin=[SAM]

Every file of configs/trainer runs as in ``experiment=unlearn/tofu/lora``, in a process of its own:
the start of the adapter, the numbers of the reference, three optimiser steps, and what comes after
them. A method may need 1.15 times the memory of gradient ascent, or 1.3 times if it asks the
reference for distributions and not for numbers alone.

The model is a random Llama, half as wide as Llama-3.2-1B and Qwen2.5-3B. Half as much as in a real
run are the rank (64, shipped 128) and the tokens of a batch (256 for about 512), and the vocabulary
is such that logits have the share that they have in Qwen2.5-3B. So adapters, gradients, activations
and logits are as large beside the weights as in a real run. There are fewer layers, for the sake of
time. A step is one micro-batch, which is the hardest comparison: where gradients accumulate,
gradient ascent keeps one set of them, too. What comes before and after the steps sees 12 or 32 rows
of each part, where a real run has 64 to 256; only ReGLU keeps something for every row.

Memory is the resident memory of the process (on a GPU, what torch has allocated), minus that just
before the model is built. A run on a small model comes before that, so that libraries which are
loaded at their first use are there. Freed blocks go back to the system at once, see ``ALLOCATOR``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

PLAIN = "GradAscent"
AGAIN = "GradAscent, again"  # how far two runs of the same differ
LIMIT, LIMIT_WITH_DISTRIBUTIONS = 1.15, 1.3
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",  # a given one does not grow with what is freed
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
ENVIRONMENT = {**ALLOCATOR, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
PACKAGES = ("torch", "transformers", "peft")
PROMPT, ANSWER = 28, 20  # tokens of every row


@dataclass(frozen=True)
class Size:
    """A Llama's shape and the rank of the adapter on it."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    rank: int

    @property
    def settings(self) -> list[str]:
        """What differs from the shipped config."""
        return [
            f"model.lora_config.r={self.rank}",
            f"model.lora_config.lora_alpha={self.rank}",
            "trainer.args.gradient_accumulation_steps=1",
            "++trainer.args.max_steps=3",
            "++trainer.args.disable_tqdm=true",
        ]


SIZES = {
    "default": Size(1024, 2816, 5, 16, 4, 12288, rank=64),
    "small": Size(64, 176, 2, 4, 2, 512, rank=4),
}


# --- in the process of one method ----------------------------------------------------------------


def measure(name: str, size: Size, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run one method and say what it took.

    Returns:
        ``before`` and ``peaks`` in bytes, the latter up to the end of each phase; passes of a step
        ``with_gradient`` and ``without_gradient``; how many the signatures ``declare``; whether the
        reference is asked for ``distributions``.

    Raises:
        InputError: the method does not run here.
    """
    from unlora.cli import compose
    from unlora.config import read
    from unlora.forward.outputs import Hidden, Outputs, Padded, ScoredTokens, SequenceLogps
    from unlora.trainer import Plugins, UnlearningLoss

    chosen = ["experiment=unlearn/tofu/lora", f"trainer={name}", *size.settings, *overrides]
    config = read(compose.composed("unlearn", chosen))
    method_args = dict(config.trainer.method_args)
    if "layer" in method_args:
        method_args["layer"] = min(method_args["layer"], size.layers - 1)
    loss = UnlearningLoss.build(config.trainer.handler, **method_args)
    plugins = Plugins.build(config.trainer.plugins, loss, use_lora=True)
    free = set(loss.asked_of_reference(SequenceLogps))
    free |= {view for view, kind in loss.views.items() if kind is ScoredTokens}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["UNLORA_CACHE"] = folder  # numbers of an earlier run would be free
        used = _run(config, loss, plugins, size, folder)
    return {
        "distributions": bool(loss.asked_of_reference(Outputs, Hidden, Padded)),
        "declared": len(set(loss.views) - free),
        **used,
    }


def _run(config: Any, loss: Any, plugins: Any, size: Size, folder: str) -> dict[str, Any]:
    """What ``unlora.recipes.train`` does with a model, from its making to its last change."""
    import torch

    from unlora.trainer import (
        SUBTRACTED,
        Guards,
        TaskVector,
        UnlearningTrainer,
        start_adapter,
        training_arguments,
    )

    args = training_arguments(config.trainer.args, output_dir=folder)
    subtracts = loss.handler in SUBTRACTED
    needed = {*loss.parts, "retain"} if plugins.start or subtracts else {*loss.parts}
    count = args.max_steps * args.gradient_accumulation_steps * args.train_batch_size
    parts = _parts(needed, max(count, 32 if plugins.start else 0), size.vocabulary)
    tokenizer = _tokenizer()
    seen = {"pad_id": tokenizer.pad_token_id, "batch_size": args.train_batch_size, "seed": 0}

    before, peaks = memory_now(), {}
    torch.manual_seed(0)
    model = _model(size, config.model.lora_config).to(args.device)
    vector = TaskVector(model, loss.forget) if subtracts else None
    penalty = start_adapter(model, plugins.start, parts, **seen) if plugins.start else None
    peaks["start"] = memory_peak()
    passes, watch = _passes(model)
    trainer = UnlearningTrainer(
        model=model, args=args, loss=loss, parts=parts, plugins=plugins, penalty=penalty,
        processing_class=tokenizer, callbacks=[Guards(), watch],
    )  # fmt: skip
    trainer.train()
    peaks["steps"] = memory_peak()
    if vector is not None:
        vector.subtract(parts, **seen)
        peaks["end"] = memory_peak()
    batches = args.max_steps * args.gradient_accumulation_steps
    return {
        "device": str(args.device),
        "before": before,
        "peaks": peaks,
        "with_gradient": passes[True] / batches,
        "without_gradient": passes[False] / batches,
    }


def _model(size: Size, lora_config: Mapping[str, Any]) -> Any:
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from unlora.model.lora import checked_lora_config

    shape = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        tie_word_embeddings=False,
    )
    return get_peft_model(LlamaForCausalLM(shape), checked_lora_config(lora_config, shape))


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")


def _parts(needed: Iterable[str], count: int, vocabulary: int) -> Any:
    """The same random rows for every method."""
    import numpy as np

    from unlora.data.chat_encoding import Encoded
    from unlora.data.pairs import Parts
    from unlora.forward import IGNORE_INDEX

    rows = {}
    for seed, part in enumerate(("forget", "retain", "alternate")):
        tokens = np.random.default_rng(seed).integers(2, vocabulary, (count, PROMPT + ANSWER))
        if part in needed:
            rows[part] = [
                Encoded(ids, [IGNORE_INDEX] * PROMPT + ids[PROMPT:]) for ids in tokens.tolist()
            ]
    return Parts(rows, "forget")


def _passes(model: Any) -> tuple[dict[bool, int], Any]:
    """Passes through the model while it trains, by whether they have a gradient; their counter."""
    import torch
    from transformers import TrainerCallback

    passes = {True: 0, False: 0}

    class Watch(TrainerCallback):
        def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
            # the numbers of the reference are known by now
            passes.update({True: 0, False: 0})
            self.handle = model.get_input_embeddings().register_forward_hook(count)

        def on_train_end(self, *_args: Any, **_kwargs: Any) -> None:
            self.handle.remove()

    def count(*_: Any) -> None:
        passes[torch.is_grad_enabled()] += 1

    return passes, Watch()


def memory_now() -> int:
    """Bytes in use."""
    torch = sys.modules["torch"]
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")


def memory_peak() -> int:
    """Bytes that were in use at most, up to now."""
    torch = sys.modules["torch"]
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(field: str) -> int:
    # the peak that getrusage gives is not below that of the process which started this one
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def child(name: str, size: str, overrides: Sequence[str]) -> None:
    """Measure one method, after a run on the small model, and print what was found as JSON."""
    import logging

    import torch

    from unlora.errors import InputError

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    started = time.monotonic()
    try:
        measure(name, SIZES["small"], overrides)
        found = measure(name, SIZES[size], overrides)
    except InputError as error:
        found = {"reason": " ".join(str(error).split())}
    print(json.dumps({**found, "seconds": time.monotonic() - started}))


# --- in the process that starts the others -------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One method beside gradient ascent; memory in bytes.

    Attributes:
        method: name of its YAML.
        passes: of a step, with and without gradient.
        declared: how many passes the signatures of its terms declare.
        distributions: whether it asks the reference for more than a number for each row.
        peak: above what the process had before.
        phase: in which the peak was: ``start``, ``steps`` or ``end``.
        ratio: of peaks.
        raw_ratio: of the whole peaks, with what the process had before.
    """

    method: str
    passes: tuple[float, float]
    declared: int
    distributions: bool
    peak: int
    phase: str
    ratio: float
    raw_ratio: float

    @property
    def limit(self) -> float:
        """The highest ratio that is well."""
        return LIMIT_WITH_DISTRIBUTIONS if self.distributions else LIMIT

    @property
    def ok(self) -> bool:
        """Whether it keeps to its limit."""
        return self.ratio <= self.limit


def compare(found: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """A row for every method that ran, in their order."""
    plain = found[PLAIN]
    whole = max(plain["peaks"].values())
    rows = []
    for name, one in found.items():
        if "reason" in one:
            continue
        highest = max(one["peaks"].values())
        rows.append(
            Row(
                method=name,
                passes=(one["with_gradient"], one["without_gradient"]),
                declared=one["declared"],
                distributions=one["distributions"],
                peak=highest - one["before"],
                phase=next(phase for phase, peak in one["peaks"].items() if peak == highest),
                ratio=(highest - one["before"]) / (whole - plain["before"]),
                raw_ratio=highest / whole,
            )
        )
    return rows


def table(rows: Sequence[Row], not_run: Mapping[str, str]) -> str:
    """Both as text for a terminal."""
    head = ("method", "passes", "reference", "peak MB", "in", "ratio", "whole", "limit", "")
    lines = [
        (
            row.method,
            f"{row.passes[0]:.3g}" + (f" + {row.passes[1]:.3g}" if row.passes[1] else ""),
            "distributions" if row.distributions else "",
            f"{row.peak / 1e6:.0f}",
            row.phase,
            f"{row.ratio:.3f}",
            f"{row.raw_ratio:.3f}",
            f"{row.limit:.2f}",
            "ok" if row.ok else "ABOVE",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    text = [
        "  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) for line in [head, *lines]
    ]
    text += [f"not run: {name}: {reason}" for name, reason in not_run.items()]
    return "\n".join(line.rstrip() for line in text)


def in_process(name: str, size: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What :func:`child` prints about a method, or the ``reason`` why it prints nothing."""
    method = PLAIN if name == AGAIN else name
    command = [sys.executable, __file__, "--child", method, "--size", size, *overrides]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        why = (done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"reason": why, "failed": True}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {found['seconds']:.0f} s", file=sys.stderr, flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table; returns 1 if a method is above its limit or ends in an error."""
    options = _options(argv)
    if options.child:
        child(options.child, options.size, options.overrides)
        return 0
    folder = resources.files("unlora.configs") / "trainer"
    names = sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".yaml"))
    if options.only:
        chosen = options.only.split(",")
        if absent := sorted({*chosen} - {*names}):
            sys.exit(f"No trainer is called {', '.join(absent)}. Known: {', '.join(names)}.")
        names = [name for name in names if name in chosen]
    names = [PLAIN, AGAIN, *(name for name in names if name != PLAIN)]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(lambda name: in_process(name, options.size, options.overrides), names)
        found = dict(zip(names, results, strict=True))
    not_run = {name: one["reason"] for name, one in found.items() if "reason" in one}
    if PLAIN in not_run:
        sys.exit(f"{PLAIN} does not run: {not_run[PLAIN]}")
    rows = compare(found)
    print(table(rows, not_run))
    if options.output:
        report = {
            "size": options.size,
            "overrides": options.overrides,
            "versions": {package: metadata.version(package) for package in PACKAGES},
            "methods": {
                row.method: {
                    "ratio": row.ratio,
                    "limit": row.limit,
                    "ok": row.ok,
                    "phase": row.phase,
                }
                | {"raw_ratio": row.raw_ratio, "peak": row.peak, **found[row.method]}
                for row in rows
            },
            "not_run": not_run,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    failed = any("failed" in one for one in found.values())
    return int(failed or not all(row.ok for row in rows))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="for every method, as on other command lines")
    parser.add_argument("--only", help="names of trainers, with commas")
    parser.add_argument("--size", choices=SIZES, default="default", help="small: only a trial")
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="at a time")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    sys.exit(main())
