"""Attach adapters to a root model, detach them, or merge them into its weights."""

import functools
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from unlora.errors import InputError
from unlora.model.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BESIDE_LORA,
    FULL_WEIGHTS,
    MEANING,
    adapter_settings,
    stored_names,
)
from unlora.model.lineage import Lineage, Link
from unlora.model.load import load_root, root_config, shortened
from unlora.model.meta_model import skeleton
from unlora.model.targets import ambiguous_pattern
from unlora.model.weight_files import shapes

# what peft puts before the name of a module
BEFORE = "base_model.model."
TWICE = ".modules_to_save."
SEVERAL_ON_PARAMETERS = tuple(map(int, metadata.version("peft").split(".")[:2])) >= (0, 20)


def load_model(
    lineage: Lineage, args: Mapping[str, Any], *, merging: bool = False
) -> tuple[PreTrainedModel | PeftModel, Lineage]:
    """The root model with every adapter of its lineage on it, unmerged; see :func:`attach`.

    Returns:
        The model, and its lineage with the root's fingerprint filled in.

    Raises:
        InputError: it is out of reach, or an adapter does not fit; before weights are read where
            that can be seen then.
    """
    architecture = root_config(lineage, args)
    if not merging:
        check_links(lineage, architecture, trust=bool(args.get("trust_remote_code")))
    base, lineage = load_root(lineage, args)
    return attach(base, lineage, merging=merging), lineage


def check_links(lineage: Lineage, architecture: PretrainedConfig, *, trust: bool = False) -> None:
    """Raises InputError where an adapter of a lineage does not fit its root, without weights.

    Args:
        architecture: the config of the root.
        trust: whether its own code may be run.
    """
    parameters = {
        frozenset(adapter_settings(link.path).get("target_parameters") or ())
        for link in lineage.links
    } - {frozenset()}
    if len(parameters) > 1:
        first, other, *_ = map(sorted, parameters)
        raise InputError(
            f"The adapters of {str(lineage)!r} are on different parameters, {first} and {other}, "
            "and peft puts several only on the same ones. Train the later one again, on full "
            "weights that `unlora export --merged` writes of the earlier one."
        )
    for link in lineage.links:
        _check_fits(link, lineage.root, _Architecture(architecture), trust)


class _Architecture:
    """A config that is the same for a cache where it says the same."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config, self.text = config, config.to_json_string(use_diff=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Architecture) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


@functools.lru_cache(maxsize=32)
def _check_fits(link: Link, root: str, architecture: _Architecture, trust: bool) -> None:
    """Put an adapter without weights on a model without weights."""
    model = skeleton(architecture.config, trust)
    sizes = shapes(link.path / ADAPTER_WEIGHTS)
    names = _names(link.path, model)
    _refuse_other_shapes(
        {name: sizes[stored] for name, stored in names.items()},
        model,
        f"The adapter {str(link.path)!r} does not fit the model {root!r}",
    )
    empty = {name: torch.empty(sizes[stored], device="meta") for name, stored in names.items()}
    adapted = put_on(model, link.path, "link", tensors=empty)
    if wrong := ambiguous_pattern(adapted, "link"):
        raise InputError(
            f"The adapter {str(link.path)!r}: {wrong}. Which of them it was trained with cannot "
            f"be told. Write one key for each module into its {ADAPTER_CONFIG}."
        )


def _refuse_other_shapes(
    sizes: Mapping[str, tuple[int, ...]], model: PreTrainedModel, does_not_fit: str
) -> None:
    modules, known = {path: m for path, m in model.named_modules() if path}, False
    for name, shape in sizes.items():
        path, _, part = name.removeprefix(BEFORE).partition(".lora_")
        module = modules.get(path)
        # experts that are modules in some versions of transformers are one tensor in others
        known |= module is not None or path.rpartition(".experts.")[0] in modules
        if isinstance(module, nn.Linear) and part[:1] in ("A", "B") and len(shape) == 2:
            inwards = part[0] == "A"
            actual = shape[1] if inwards else shape[0]
            size = module.in_features if inwards else module.out_features
            if actual != size:
                raise InputError(
                    f"{does_not_fit}: it has {actual} {'inputs' if inwards else 'outputs'} at "
                    f"{path}, the model {size}. Give the model that it was trained on."
                )
    if not known:
        raise InputError(
            f"{does_not_fit}: none of its modules is in a {model.config.model_type}, "
            f"{next(iter(sizes)).partition('.lora_')[0]} among them. Give the model that it was "
            "trained on."
        )


def attach(
    base: PreTrainedModel, lineage: Lineage, *, merging: bool = False
) -> PreTrainedModel | PeftModel:
    """Put every adapter of the lineage on its root, unmerged, frozen and switched on.

    Args:
        merging: the model is only to be merged, so an adapter may hold more than LoRA.
    """
    if not lineage.links:
        return base
    model: Any = base
    for number, link in enumerate(lineage.links):
        model = put_on(model, link.path, f"link{number}", merging=merging)
    for name, weight in model.named_parameters():
        if "lora_" in name and not weight.isfinite().all():
            raise InputError(
                f"An adapter of {str(lineage)!r} holds NaN or infinity ({name}). Its training "
                "diverged, or the file is damaged: give one from before, such as a checkpoint."
            )
    model.base_model.set_adapter([f"link{n}" for n in range(len(lineage.links))])
    model.requires_grad_(False)
    return model.eval()


def put_on(
    model: PreTrainedModel | PeftModel,
    folder: Path,
    name: str,
    *,
    trainable: bool = False,
    merging: bool = False,
    tensors: dict[str, Tensor] | None = None,
) -> PeftModel:
    """Put a saved adapter on a model, beside those that are there.

    Args:
        name: what it is called there.
        trainable: it is to be trained further, with its dropout; else it is frozen and has none.
        merging: it may hold more than LoRA.
        tensors: without content, for a model without content, in place of those of the folder.

    Raises:
        InputError: something of the one finds no place in the other.
    """
    config = _lora_config(folder, trainable=trainable, merging=merging)
    empty, plain = tensors is not None, _plain(model)
    if not empty and any(weight.is_meta for weight in plain.parameters()):
        # accelerate holds weights back that do not fit, and peft has it hold back these, too
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), name)
            return model
        held: PeftModel = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
        return held
    weights_read = _read(folder, plain) if tensors is None else tensors
    with _fits(folder, str(plain.name_or_path)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if merging:
            # peft has saved these twice
            weights_read = {key: value for key, value in weights_read.items() if TWICE not in key}
            _make_room(plain, weights_read)
        if isinstance(model, PeftModel):
            model.add_adapter(name, config, low_cpu_mem_usage=empty)
        else:
            model = PeftModelForCausalLM(model, config, name, low_cpu_mem_usage=empty)
    load_weights(model, folder, name, weights_read, merging=merging)
    return model


def load_weights(
    model: PeftModel,
    folder: Path,
    name: str,
    tensors: dict[str, Tensor] | None = None,
    *,
    merging: bool = False,
) -> None:
    """Read the weights of an adapter that is on a model already.

    Args:
        tensors: see :func:`put_on`.
        merging: see :func:`put_on`.

    Raises:
        InputError: something of the one finds no place in the other.
    """
    root = str(_plain(model).name_or_path)
    tensors = _read(folder, _plain(model)) if tensors is None else tensors
    empty = any(tensor.is_meta for tensor in tensors.values())
    if not merging:
        _take_out_copies(tensors, model, folder)
    with _fits(folder, root):
        result = set_peft_model_state_dict(model, tensors, name, low_cpu_mem_usage=empty)
    mine = re.compile(rf"\.{name}(?=\.|$)")
    missing = [key for key in result.missing_keys if "lora_" in key and mine.search(key)]
    left_out = [mine.sub("", key) for key in result.unexpected_keys]
    if left_out:
        hint = " It was trained with use_dora=true." if "magnitude" in left_out[0] else ""
        raise InputError(
            f"The adapter {str(folder)!r} does not fit the model {root!r}: {len(left_out)} of its "
            f"tensors find no place and would be left out, {', '.join(left_out[:2])} among "
            f"them.{hint} Give the model and the {ADAPTER_CONFIG} that it was trained with."
        )
    if missing:
        raise InputError(
            f"The adapter {str(folder)!r} lacks weights of modules that its {ADAPTER_CONFIG} "
            f"names, {', '.join(mine.sub('', key) for key in missing[:2])} among them. Download "
            "or copy it again."
        )


def _plain(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    plain: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return plain


@contextmanager
def _fits(folder: Path, root: str) -> Iterator[None]:
    """What peft says of an adapter and a model that are not of each other, in one sentence."""
    try:
        yield
    except Exception as error:  # peft fails in ways of its own
        raise InputError(
            f"The adapter {str(folder)!r} does not fit the model {root!r}: {shortened(error)}. "
            "Give the model that it was trained on."
        ) from error


def _lora_config(folder: Path, *, trainable: bool, merging: bool) -> LoraConfig:
    """The settings of an adapter that have a meaning once it is trained."""
    settings = adapter_settings(folder)
    keys = [*MEANING, *((*BESIDE_LORA, "init_lora_weights") if merging else ())]
    lora_settings = {
        k: settings[k] for k in keys if settings.get(k) is not None and k != "peft_type"
    }
    dropout = settings.get("lora_dropout") or 0.0 if trainable else 0.0
    try:
        return LoraConfig(
            **lora_settings,
            lora_dropout=dropout,
            task_type="CAUSAL_LM",
            inference_mode=not trainable,
        )
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{str(folder / ADAPTER_CONFIG)!r}: {shortened(error)}. Put back the one that was "
            "written with the weights."
        ) from error


def _names(folder: Path, model: PreTrainedModel) -> dict[str, str]:
    """Name of a tensor on this model -> name in the file of an adapter."""
    renamed = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    names = {}
    for name, stored in stored_names(folder).items():
        path = name.removeprefix(BEFORE)
        for pattern, replacement in renamed.items():
            path, count = re.subn(pattern, replacement, path)
            if count:
                break
        names[f"{BEFORE}{path}" if name.startswith(BEFORE) else name] = stored
    return names


def _read(folder: Path, model: PreTrainedModel) -> dict[str, Tensor]:
    content = load_file(folder / ADAPTER_WEIGHTS)
    return {name: content[stored] for name, stored in _names(folder, model).items()}


def _take_out_copies(tensors: dict[str, Tensor], model: PeftModel, folder: Path) -> None:
    """peft saves the weights below an adapted head, too; they must be those of the model.

    Raises:
        InputError: they are not.
    """
    for name in [name for name in tensors if ".lora_" not in name]:
        try:
            below = model.get_parameter(name)
        except AttributeError:
            continue
        copy = tensors.pop(name)
        if copy.shape == below.shape:
            coarse = min(copy.dtype, below.dtype, key=lambda dtype: torch.finfo(dtype).bits)
            if copy.is_meta or torch.equal(copy.to(coarse), below.detach().cpu().to(coarse)):
                continue
        path = name.removeprefix(BEFORE).replace(".base_layer", "")
        raise InputError(
            f"The adapter {str(folder)!r} brings a {path} of its own, {tuple(copy.shape)}, which "
            f"is not that of the model {model.name_or_path!r}, {tuple(below.shape)}. "
            f"{FULL_WEIGHTS.format(folder=folder)} and give model=NEW, or give the model that it "
            "was trained on."
        )


def _make_room(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """As many rows in the embedding as an adapter has that was trained with new tokens."""
    embedding = model.get_input_embeddings()
    path = next(name for name, module in model.named_modules() if module is embedding)
    for name in (f"{BEFORE}{path}.weight", f"{BEFORE}{path}.base_layer.weight"):
        if name in tensors and len(tensors[name]) != len(embedding.weight):
            model.resize_token_embeddings(len(tensors[name]), mean_resizing=False)
