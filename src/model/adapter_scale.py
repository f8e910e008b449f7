"""Scale the adapter that a run trained, in memory or as a run folder of its own.

The model of a run is W + s B A, with W what its last adapter was trained on. Scaled by c it is
W + c s B A: c = 0 is the model before the run, 1 the one after, and what lies between them costs no
training. An adapter that starts from the weights (``adapter_init``) holds trained minus start, so
the same is exact for it.
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer

from unlora.errors import GuardError, InputError
from unlora.model.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BESIDE_LORA,
    STARTS_ABOVE,
    adapter_settings,
    shown,
)
from unlora.model.attach import load_model
from unlora.model.lineage import Lineage
from unlora.model.merge import lora_layers
from unlora.model.probe import Probe, answers, tolerance
from unlora.model.reference import last_link_off
from unlora.model.run_defaults import RUN
from unlora.runs.atomic_files import whole_folder, write_json
from unlora.runs.run import Run, alone, full_disk_in_words, refuse_filled, refuse_unwritable
from unlora.runs.safe_loading import read_mapping

COPIED = (
    "README.md", "*.jinja", "*.model", "added_tokens.json", "additional_chat_templates",
    "merges.txt", "row_hashes.npz", "special_tokens_map.json", "tokenizer*.json", "vocab.*",
)  # fmt: skip
# of what the last adapter does to the log-probabilities, the share that may differ
ALLOWED_ERROR = 0.05
logger = logging.getLogger(__name__)


@contextmanager
def scaled(model: PeftModel, adapter: str, scale: float) -> Iterator[None]:
    """Multiply what an adapter adds to the model by ``scale``; no weight is touched.

    Args:
        adapter: its name on the model, ``model.active_adapters[-1]`` for the last of a lineage.
        scale: 0 is the adapter switched off, 1 as it was trained.

    Raises:
        ValueError: no layer has this adapter, it is merged, or it is DoRA, which is not linear.
    """
    layers = _scalable_layers(model, adapter)
    trained = [layer.scaling[adapter] for layer in layers]
    try:
        for layer, scaling in zip(layers, trained, strict=True):
            layer.scaling[adapter] = scaling * scale
        yield
    finally:
        for layer, scaling in zip(layers, trained, strict=True):
            layer.scaling[adapter] = scaling


def scale_adapter(model: PeftModel, adapter: str, scale: float) -> None:
    """Multiply what an adapter adds to the model, for as long as the model is in memory.

    Raises:
        ValueError: as of :func:`scaled`.
    """
    for layer in _scalable_layers(model, adapter):
        layer.scaling[adapter] *= scale


def _scalable_layers(model: PeftModel, adapter: str) -> list[LoraLayer]:
    layers = [layer for layer in lora_layers(model.modules()) if adapter in layer.scaling]
    merged = any(adapter in layer.merged_adapters for layer in layers)
    if not layers or merged or model.peft_config[adapter].use_dora:
        raise ValueError(
            f"the adapter {adapter!r} cannot be scaled: it must be plain LoRA, unmerged, and one "
            f"of {[*model.peft_config]}"
        )
    return layers


def why_not_scalable(folder: Path) -> str | None:
    """Explain why the last adapter of a run folder cannot be scaled exactly; None where it can.

    Raises:
        InputError: a file of the run is damaged.
    """
    if not folder.is_dir():
        return f"There is no run folder {str(folder)!r} to scale. Give that of a training."
    if not (folder / ADAPTER_CONFIG).is_file():
        state = "was trained in full" if (folder / "config.json").is_file() else "has no adapter"
        return (
            f"The run {str(folder)!r} {state}, and only an adapter can be scaled. Give the folder "
            "of a finished run with model.use_lora=true."
        )
    settings = adapter_settings(folder)
    fact = f"The adapter {str(folder)!r} has"
    for key, what in ({"use_dora": "magnitudes that were trained"} | BESIDE_LORA).items():
        if settings.get(key) and settings[key] != "none":
            return (
                f"{fact} {key}={shown(settings[key])}: {what} do not scale with its product. "
                "Train it again as plain LoRA, and scale that."
            )
    start = settings.get("init_lora_weights", True)
    if start not in STARTS_ABOVE:
        return (
            f"{fact} init_lora_weights={shown(start)}: it belongs on weights that this start has "
            "changed, not on its base model. Convert it where it was trained, with peft's "
            "save_pretrained(FOLDER, path_initial_model_for_weight_conversion=...), and scale that."
        )
    if (_config(folder).get("model") or {}).get("lineage") == "continue":
        return (
            f"The run {str(folder)!r} was trained with model.lineage=continue: its one adapter "
            "holds what was learnt before and the unlearning, and both would be scaled. Train "
            "again with model.lineage=auto, which puts a new adapter beside it, and scale that."
        )
    return None


def write_scaled(run: str | Path, scale: float, output: str | Path) -> Path:
    """Write a run folder whose last adapter is that of ``run`` times ``scale``.

    The weights are the same file; the scale is in ``lora_alpha`` and ``alpha_pattern``. The folder
    is there whole, its answers compared, or not at all.

    Args:
        scale: 0 is the model before the run, 1 the one after.
        output: a folder that does not exist yet, or is empty.

    Raises:
        InputError: the adapter cannot be scaled, or the folder cannot be written.
        GuardError: what was written answers differently.
    """
    run, folder = Path(run), Path(output)
    if not (math.isfinite(scale) and scale >= 0):
        raise InputError(f"The scale is {scale}; it must be a number from 0 on. 1 is as trained.")
    if reason := why_not_scalable(run):
        raise InputError(reason)
    lineage = Lineage.read(str(run))
    refuse_unwritable(folder, "folder of the scaled run", "Choose")
    with alone(folder), full_disk_in_words(folder):
        refuse_filled(folder)
        folder.resolve().mkdir(exist_ok=True)
        with whole_folder(folder) as temporary:
            _write(run, lineage, scale, temporary, folder)
    return folder


def _write(run: Path, lineage: Lineage, scale: float, temporary: Path, folder: Path) -> None:
    """Write the run into ``temporary``, which becomes ``folder``."""
    config = _config(run)
    written = Run(str(temporary), _moved(config, folder))
    model, lineage = load_model(lineage, {"dtype": "auto"})
    probe = _probe(model, scale)
    del model
    for file in {file for pattern in COPIED for file in _run_folder(run).glob(pattern)}:
        copy = shutil.copytree if file.is_dir() else shutil.copyfile
        copy(file, temporary / file.name)
    shutil.copyfile(run / ADAPTER_WEIGHTS, temporary / ADAPTER_WEIGHTS)
    write_json(temporary / ADAPTER_CONFIG, _scaled_settings(adapter_settings(run), scale))
    below = replace(lineage, links=lineage.links[:-1])
    below.write(temporary)
    finding = _check_same(probe, temporary)
    if config:
        written.begin(fresh=False)
    origin = os.path.relpath(run.resolve(), folder.resolve())
    facts = {"origin": origin, "sha256": lineage.links[-1].sha256, "scale": scale}
    guards = {"written equals scaled": finding}
    written.finish(scaled=facts, lineage=str(below), guards=guards)


def _probe(model: PeftModel, scale: float) -> Probe:
    """What the model says with its last adapter scaled, and without it."""
    with scaled(model, model.active_adapters[-1], scale):
        probe = Probe.take(model)
    with last_link_off(model):
        return replace(probe, without=answers(model, probe.input_ids))


def _check_same(probe: Probe, folder: Path) -> str:
    """Raises GuardError where the run that was written answers otherwise than the probe."""
    model, _ = load_model(Lineage.read(str(folder)), {"dtype": "auto"})
    seen, allowed = probe.compared(model), tolerance(model)
    finding = f"logits differ from those of the scaled adapter by {seen.difference:.2e}"
    if seen.relative > allowed or seen.error > ALLOWED_ERROR:
        raise GuardError(
            f"written equals scaled: {finding} ({seen.relative:.1e} of their size, {allowed:.0e} "
            f"allowed; {seen.error:.0%} of what the adapter does). Nothing was written."
        )
    logger.info("guard: written equals scaled: %s", finding)
    return finding


def _scaled_settings(settings: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """The settings of an adapter with every alpha times ``scale``; peft divides it by the rank."""
    alpha, pattern = settings.get("lora_alpha"), settings.get("alpha_pattern") or {}
    alpha = LoraConfig.lora_alpha if alpha is None else alpha
    scaled_pattern = {key: value * scale for key, value in pattern.items()}
    return {**settings, "lora_alpha": alpha * scale, "alpha_pattern": scaled_pattern}


def _run_folder(run: Path) -> Path:
    """The folder that says how a model was trained: for a checkpoint, the one above it."""
    above = run.name.startswith("checkpoint-") and not (run / RUN).is_file()
    return run.parent if above else run


def _config(run: Path) -> dict[str, Any]:
    """``run_config.json``; nothing for an adapter that another program trained."""
    file = _run_folder(run) / RUN
    return dict(read_mapping(file)) if file.is_file() else {}


def _moved(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The config with the new folder wherever it names that of the origin."""
    before, text = (config.get("paths") or {}).get("output_dir"), json.dumps(config)
    if before:
        text = text.replace(json.dumps(before), json.dumps(str(folder)))
    return json.loads(text) | ({"task_name": folder.name} if "task_name" in config else {})
