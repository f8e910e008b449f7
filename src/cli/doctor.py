"""Report what this machine has, and whether a run would fit on it: ``unlora doctor``.

Loads no weights and changes nothing.
"""

import importlib
import logging
import os
import platform
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from unlora.cli.main import launch, refuse_broken_stack
from unlora.cli.overrides import EXPERIMENTS, flag, given, normalised
from unlora.errors import InputError
from unlora.runs.machine import GIB, in_words, memory
from unlora.runs.run import PROGRAM

PACKAGES = (
    "unlora",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "lm_eval",
    "bitsandbytes",
)
INSTEAD = {"eval": "--plan", "study": "--dry-run"}  # what says beforehand what those will do


def main(argv: Sequence[str]) -> None:
    """Print one line for each finding, and the memory that a run needs where one is given.

    Raises:
        InputError: the installed packages do not fit together, or the run would not start.
    """
    if not argv:
        _print(_machine())
        refuse_broken_stack()
        return
    args = normalised(argv)
    name = (flag(args, "--config-name", "-cn") or _config_of(args)).removesuffix(".yaml")
    if name in INSTEAD:
        raise InputError(
            f"unlora doctor estimates trainings. Type: unlora {name} {' '.join(argv)} "
            f"{INSTEAD[name]}"
        )
    if "--plan" in argv:
        raise InputError(
            "--plan is a flag of `unlora train`, `unlearn` and `eval`; doctor has no such flag."
        )
    launch(_examine, name, argv)


def _config_of(args: Sequence[str]) -> str:
    """The config that the experiment belongs to, by its first folder."""
    experiment = given(args).get("experiment")
    if experiment is None:
        raise InputError(
            f"unlora doctor cannot use {args[0]!r} without an experiment. Type: unlora doctor, or: "
            "unlora doctor experiment=unlearn/tofu/lora"
        )
    owners = (name for name, folder in EXPERIMENTS.items() if experiment.startswith(f"{folder}/"))
    return next(owners, "unlearn")


def _print(findings: Iterator[tuple[str, str]]) -> None:
    for what, finding in findings:
        print(f"{what:14}{finding}", flush=True)


# --- the machine ---------------------------------------------------------------------------------


def _machine() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in PACKAGES:
        yield package, _version(package)
    yield "processor", f"{os.cpu_count()} cores, {platform.machine()}"
    yield "memory", _memory()
    yield "gpu", _gpus()
    yield "disk", _disk(Path("saves"))
    yield "hub", _hub()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _memory() -> str:
    total, available = memory()
    if total is None:
        return "unknown"
    free = "" if available is None else f", {available / GIB:.1f} GiB available"
    return f"{total / GIB:.1f} GiB{free}"


def _gpus() -> str:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        return f"unknown: {error}"
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return ", ".join(f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB)" for gpu in gpus)
    if torch.backends.mps.is_available():
        return "Apple (mps)"
    return "none that torch can use; everything runs on the processor"


def _disk(folder: Path) -> str:
    there = next(x for x in (folder.resolve(), *folder.resolve().parents) if x.is_dir())
    writable = "" if os.access(there, os.W_OK) else ", NOT writable"
    return f"{shutil.disk_usage(there).free / GIB:.1f} GiB free for {folder}/{writable}"


def _hub() -> str:
    from huggingface_hub import constants, get_token

    token = "with a token" if get_token() else "no token, which only gated models need"
    if constants.HF_HUB_OFFLINE:
        return f"switched off by HF_HUB_OFFLINE; cache {constants.HF_HUB_CACHE}"
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=5).close()  # noqa: S310 - one's own
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError as error:
        reason = getattr(error, "reason", error)
        return f"{constants.ENDPOINT} not reachable ({reason}); cache {constants.HF_HUB_CACHE}"
    return f"{constants.ENDPOINT} reachable, {token}; cache {constants.HF_HUB_CACHE}"


# --- a run ---------------------------------------------------------------------------------------


def _examine(cfg: Any) -> None:
    from unlora.config import read

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every attempt
    config = read(cfg)
    if not config.trainer.handler:
        raise InputError("This config trains nothing. Give trainer=NAME.")
    _print(_machine())
    print()

    from unlora.model import resolve_model
    from unlora.trainer import Plugins, UnlearningLoss, training_arguments
    from unlora.trainer.batch_layout import choose_layout
    from unlora.trainer.checkpointing import available_memory
    from unlora.trainer.largest_batch import largest_batches
    from unlora.trainer.memory_estimate import estimate

    loss = UnlearningLoss.build(config.trainer.handler, **config.trainer.method_args)
    Plugins.build(config.trainer.plugins, loss, use_lora=config.model.use_lora)
    model = resolve_model(config.model)
    args = training_arguments(
        config.trainer.args, output_dir=config.paths.output_dir, dtype=model.load_kwargs["dtype"]
    )
    needs = estimate(config, model=model)
    parts = [*needs.batches]
    layout = choose_layout(
        config,
        args,
        lambda rows: largest_batches(config, model.section, parts, rows)[0],
        lambda batches: estimate(config, batches, model=model),
        available=available_memory(),
    )
    if layout is not None:
        if layout.rows != args.train_batch_size:
            batches, _ = largest_batches(config, model.section, parts, layout.rows)
            needs = estimate(config, batches, model=model)
        needs = needs.switched(layout.checkpointing)
    _print(_needs(needs, config, layout.why if layout else "as set"))


def _needs(needs: Any, config: Any, why: str) -> Iterator[tuple[str, str]]:
    """What an estimate says, and whether there is as much; ``why`` is of how a step is split."""
    from unlora.trainer.batch_layout import CHECKPOINTING_IS

    share = needs.trained / needs.parameters
    yield "model", config.model.model_args["pretrained_model_name_or_path"]
    yield "parameters", f"{needs.parameters:,}, adapters included"
    yield "trained", f"{needs.trained:,} ({share:.2%})"
    yield "on disk", f"{in_words(needs.file)} for each checkpoint, without the optimiser"
    for part, batch in needs.batches.items():
        part = part if config.data.get(part) else "train"
        size = f"{batch.rows} rows of {batch.tokens} tokens, {batch.scored} of all scored"
        yield f"batch, {part}", size
    yield "lengths", needs.lengths
    other = "without" if needs.checkpointing else "with"
    for part, size in needs.parts.items():
        more = ""
        if part == "activations":
            more = f" ({other} gradient checkpointing {in_words(needs.other_activations)})"
        if size or part != "reference":
            yield part, in_words(size) + more
    libraries = f"{in_words(PROGRAM)} for Python and its libraries"
    if why == "as set":
        yield "checkpointing", f"{'on' if needs.checkpointing else 'off'}, {why}"
    elif why.startswith(CHECKPOINTING_IS):
        yield "checkpointing", why.removeprefix(CHECKPOINTING_IS).strip()
    else:
        yield "at once", why
    yield "in all", f"about {in_words(needs.total_bytes)}, and {libraries}"
    yield "fits", _verdict(needs, config)


def _verdict(needs: Any, config: Any) -> str:
    torch = importlib.import_module("torch")
    if torch.cuda.is_available():
        where, needed = torch.cuda.get_device_name(0), needs.total_bytes
        available: int | None = torch.cuda.mem_get_info(0)[0]
    else:
        where, needed = "the memory of this machine", needs.total_bytes + PROGRAM
        available = memory()[1]
    if available is None:
        return f"unknown; {in_words(needed)} are needed"
    both = f"{in_words(needed)} of {in_words(available)} available in {where}"
    if needed <= 0.85 * available:
        return f"yes: {both}"
    advice = ", ".join(_advice(needs, config)) or "choose a smaller model"
    return f"{'hardly' if needed <= available else 'no'}: {both}. To need less: {advice}"


def _advice(needs: Any, config: Any) -> Iterator[str]:
    """What would save memory, the most effective first."""
    args = config.trainer.args
    rows = args.get("per_device_train_batch_size") or 8
    saved = {}
    if not needs.checkpointing:
        saved["trainer.args.gradient_checkpointing=true"] = (
            needs.activations - needs.other_activations
        )
    if rows > 1:
        more = rows * (args.get("gradient_accumulation_steps") or 1)
        words = (
            "trainer.args.per_device_train_batch_size=1 "
            f"trainer.args.gradient_accumulation_steps={more}"
        )
        saved[words] = (needs.activations + needs.logits) * (rows - 1) // rows
    if not config.model.use_lora:
        saved["model.use_lora=true"] = needs.optimiser + needs.gradients + needs.reference
    elif not (config.model.quantisation or config.model.model_args.get("quantization_config")):
        saved["model.quantisation=nf4 (needs bitsandbytes)"] = needs.weights * 2 // 3
    for words, size in sorted(saved.items(), key=lambda pair: -pair[1]):
        if size > 0.05 * needs.total_bytes:
            yield f"{words} (saves about {in_words(size)})"
