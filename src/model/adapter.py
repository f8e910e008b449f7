"""Check what an adapter may contain: the one door through which adapters enter.

An adapter is read exactly or refused in one sentence, before any weights are loaded. What its
settings may be is here; whether its tensors fit a model, in ``attach.check_links``.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unlora.errors import InputError
from unlora.model.weight_files import shapes
from unlora.runs.safe_loading import read_json, refuse_pickle

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# settings that say what the tensors of an adapter mean
MEANING = (
    "alpha_pattern", "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform",
    "lora_alpha", "peft_type", "r", "rank_pattern", "target_modules", "target_parameters",
    "use_dora", "use_rslora",
)  # fmt: skip
# settings that do not change the answers of a trained adapter
WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode",
    "init_lora_weights", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
)  # fmt: skip
# what is trained beside LoRA: it has no switch, and can only be written into full weights
BESIDE_LORA = {
    "bias": "biases that were trained",
    "lora_bias": "biases of its own",
    "modules_to_save": "modules that were trained as a whole",
    "trainable_token_indices": "rows of the embedding that were trained",
}
UNREADABLE = {
    "alora_invocation_tokens": "acts only after these tokens",
    "arrow_config": "routes between several adapters",
    "ensure_weight_tying": "shares its factors between layers",
    "kasa_config": "cuts off a part of the weights below",
    "layer_replication": "repeats layers of the model",
    "megatron_config": "is for layers of Megatron",
    "monteclora_config": "draws its weights at random",
    "use_bdlora": "has factors in blocks",
    "use_qalora": "is for weights quantised by GPTQ",
    "velora_config": "was trained with compressed activations",
}
# starts that leave the weights below as they are; of the others some can be computed again
STARTS_ABOVE = (True, False, "gaussian", "eva", "orthogonal", "mica")
STARTS_FROM_WEIGHTS = ("pissa", "olora")
# the hashes of lineages written before all settings were in them
MEANING_BEFORE = tuple(
    key for key in MEANING if key not in ("exclude_modules", "target_parameters")
)
NAMED = re.compile(
    r"(\.lora_(?:(?:embedding_)?[AB]|magnitude_vector))\.(?!weight$|bias$)([^.]+)(?=\.|$)"
)
FULL_WEIGHTS = "Write it into full weights with `unlora export {folder} --merged --output NEW`"


def adapter_settings(folder: Path) -> dict[str, Any]:
    """The content of ``adapter_config.json``.

    Raises:
        InputError: it is not JSON.
    """
    try:
        content: dict[str, Any] = read_json(folder / ADAPTER_CONFIG)
        if not isinstance(content, dict):
            raise ValueError(f"{type(content).__name__} where keys and values should be")
    except ValueError as error:
        raise InputError(
            f"{str(folder / ADAPTER_CONFIG)!r} holds no settings of an adapter ({error}). Download "
            "or copy it again."
        ) from error
    return content


def check_adapter(folder: Path, *, merging: bool = False) -> dict[str, Any]:
    """The settings of an adapter that can be read exactly.

    Args:
        merging: it is only to be written into full weights, so more may be trained than LoRA.

    Raises:
        InputError: files are missing or damaged, or it is more than LoRA.
    """
    if folder.is_dir():
        refuse_pickle(folder, ADAPTER_WEIGHTS)
    for file in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        if not (folder / file).is_file():
            raise InputError(
                f"The lineage needs the adapter {folder / file}, which is not there. "
                "Put the folder back, or give another model."
            )
    settings = adapter_settings(folder)
    _check_kind(folder, settings)
    _check_settings(folder, settings, merging)
    _check_start(folder, settings.get("init_lora_weights", True), merging)
    _check_ranks(folder, settings)
    return settings


def _check_kind(folder: Path, settings: Mapping[str, Any]) -> None:
    kind, task = settings.get("peft_type"), settings.get("task_type")
    if kind != "LORA":
        raise InputError(
            f"The adapter {str(folder)!r} is of the peft_type {kind!r}; only LORA can be "
            "read. Give a LoRA adapter."
        )
    if task not in (None, "CAUSAL_LM"):
        raise InputError(
            f"The adapter {str(folder)!r} is for the task {task!r}; only CAUSAL_LM, text from "
            "left to right, can be read. Give an adapter of a language model."
        )


def _check_settings(folder: Path, settings: Mapping[str, Any], merging: bool) -> None:
    known = {*MEANING, *WITHOUT_EFFECT, *BESIDE_LORA, *UNREADABLE}
    for key, value in settings.items():
        if not value or value == "none" or key in MEANING or key in WITHOUT_EFFECT:
            continue
        fact = f"The adapter {str(folder)!r} has {key}={shown(value)}"
        if key in BESIDE_LORA and not merging:
            raise InputError(
                f"{fact}: {BESIDE_LORA[key]} cannot be switched off as LoRA can, which gives the "
                f"reference. {FULL_WEIGHTS.format(folder=folder)}, and give model=NEW."
            )
        if key in UNREADABLE:
            raise InputError(
                f"{fact}: such an adapter {UNREADABLE[key]}, which cannot be read. Merge it with "
                "the program that trained it, and give the merged model."
            )
        if key not in known:
            raise InputError(
                f"{fact}, a fact that is not known and may change what its weights mean. Take "
                f"it out of {ADAPTER_CONFIG} if it does not, or merge the adapter with the program "
                "that trained it."
            )


def _check_start(folder: Path, start: Any, merging: bool) -> None:
    if start in STARTS_ABOVE or (merging and start in STARTS_FROM_WEIGHTS):
        return
    fact = (
        f"The adapter {str(folder)!r} has init_lora_weights={shown(start)}: it belongs on weights "
        "that this start has changed, not on its base model."
    )
    convert = "save_pretrained(FOLDER, path_initial_model_for_weight_conversion=...) of peft"
    if start in STARTS_FROM_WEIGHTS:
        raise InputError(
            f"{fact} {FULL_WEIGHTS.format(folder=folder)}, and give model=NEW; or convert it "
            f"where it was trained, with {convert}."
        )
    raise InputError(
        f"{fact} They cannot be computed again: convert it where it was trained, with {convert}, "
        "or give the merged model. If it was converted, set init_lora_weights to true."
    )


def _check_ranks(folder: Path, settings: Mapping[str, Any]) -> None:
    file, rank = folder / ADAPTER_WEIGHTS, settings.get("r")
    shape_of = shapes(file)
    if not any("lora_" in name for name in shape_of):
        raise InputError(f"{str(file)!r} holds no LoRA weights. Give the adapter that was trained.")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise InputError(
            f"{folder / ADAPTER_CONFIG} says r={shown(rank)}; it must be a whole number above 0. "
            "Put back the one that was written with the weights."
        )
    ranks = {shape[0] for name, shape in shape_of.items() if ".lora_A." in name and shape}
    one_rank = not settings.get("rank_pattern") and not settings.get("target_parameters")
    if one_rank and ranks - {rank}:
        raise InputError(
            f"The weights {str(file)!r} have rank {min(ranks - {rank})}, but adapter_config.json "
            f"beside them says r={rank}. They are of two adapters; put back what belongs together."
        )


def stored_names(folder: Path) -> dict[str, str]:
    """Tensor name as peft has it -> name in the file, which may hold the adapter's name, too.

    Raises:
        InputError: the file holds several adapters.
    """
    names, adapters = {}, set()
    for stored in shapes(folder / ADAPTER_WEIGHTS):
        adapters |= {match[2] for match in NAMED.finditer(stored)}
        names[NAMED.sub(r"\1", stored)] = stored
    if len(adapters) > 1:
        raise InputError(
            f"{str(folder / ADAPTER_WEIGHTS)!r} holds several adapters: "
            f"{', '.join(sorted(adapters))}. Save each into a folder of its own."
        )
    return names


def settings_hash(settings: Mapping[str, Any]) -> str:
    """sha256 of all settings that can change the answers."""
    meaning = {
        key: sorted(value, key=str) if isinstance(value, list) else value
        for key, value in settings.items()
        if value and key not in WITHOUT_EFFECT
    }
    return _hash({"settings": meaning})


def settings_hash_before(settings: Mapping[str, Any]) -> str:
    """The same as lineages have it that were written when fewer settings were in it."""
    meaning = {key: settings.get(key) for key in MEANING_BEFORE}
    if isinstance(meaning["target_modules"], list):
        meaning["target_modules"] = sorted(meaning["target_modules"])
    return _hash(meaning)


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def shown(value: Any) -> str:
    """A setting in a message, no longer than is read."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
