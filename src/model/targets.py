"""Find the modules that a new adapter is put on, before any weights are read."""

import copy
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, PeftModel, PeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unlora.config.resolve import shipped
from unlora.errors import InputError
from unlora.model.adapter import STARTS_FROM_WEIGHTS
from unlora.model.default_targets import default_targets, has_experts
from unlora.model.load import shortened
from unlora.model.meta_model import skeleton
from unlora.registry import unknown

PATTERNS = ("rank_pattern", "alpha_pattern")
logger = logging.getLogger(__name__)


def checked_lora_config(
    lora_config: Mapping[str, Any], architecture: PretrainedConfig, *, trust: bool = False
) -> LoraConfig:
    """A ``LoraConfig`` that fits an architecture: peft puts it on a model without weights.

    Of a model that reads more than text, only what reads text is adapted.

    Args:
        lora_config: keyword arguments of ``peft.LoraConfig``.
        trust: whether the architecture's own code may be run.

    Raises:
        InputError: settings that do not go together, or that fit nothing.
    """
    try:
        config = LoraConfig(**lora_config)
    except (TypeError, ValueError) as error:
        raise InputError(f"lora_config: {' '.join(str(error).split())}") from error
    model = skeleton(architecture, trust)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    _take_own_names(config, linear, model)
    _check_names(config, linear, model)
    _leave_out_other_senses(config, model)
    if not config.fan_in_fan_out and all(isinstance(m, Conv1D) for m in _named(config, linear)):
        config.fan_in_fan_out = True  # as peft does with a warning
    _check_layers(config, linear)
    adapted = _tried(config, model)
    places = adapted_places(adapted, "default")
    _check_all_are_used(config, places)
    _check_patterns(adapted, places)
    tried: LoraConfig = adapted.peft_config["default"]
    tried.init_lora_weights = config.init_lora_weights
    return tried


def adapted_places(model: PeftModel, adapter: str) -> dict[str, LoraLayer]:
    """Name in the plain model of every module or parameter that an adapter is on."""
    layers = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and adapter in module.r:
            plain = name.replace(".base_layer", "")
            parameter = getattr(module, "parameter_name", None)
            layers[f"{plain}.{parameter}" if parameter else plain] = module
    return layers


def ambiguous_pattern(model: PeftModel, adapter: str) -> str | None:
    """Where two keys of a pattern name one module: peft takes the first, and saving sorts them."""
    for pattern in PATTERNS:
        values = getattr(model.peft_config[adapter], pattern) or {}
        for path in adapted_places(model, adapter):
            keys = [key for key in values if _fits(key, path)]
            if len({values[key] for key in keys}) > 1:
                return (
                    f"{pattern} has {keys[0]!r}: {values[keys[0]]} and {keys[1]!r}: "
                    f"{values[keys[1]]}, which are both for {path}"
                )
    return None


@contextmanager
def patterns_are_checked() -> Iterator[None]:
    """peft 0.21 warns that patterns for experts are ignored, which are its own and are used."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
        yield


def _fits(key: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", path) is not None  # peft's rule


def _named(config: LoraConfig, linear: Mapping[str, nn.Module]) -> list[nn.Module]:
    targets = config.target_modules
    if not isinstance(targets, (set, list)):
        return list(linear.values())
    return [m for name, m in linear.items() if any(_ends(name, target) for target in targets)]


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _take_own_names(
    config: LoraConfig, linear: Mapping[str, nn.Module], model: PreTrainedModel
) -> None:
    """Put the default targets into the architecture's names, where it lacks one or has experts."""
    targets = config.target_modules
    if not isinstance(targets, (set, list)):
        return
    default = set(shipped("lora/default.yaml")["target_modules"])
    there = all(any(_ends(name, target) for name in linear) for target in targets)
    if set(targets) != default or (there and not has_experts(model)):
        return
    own = default_targets(model)
    logger.info("the adapter of a %s is on its %s", model.config.model_type, ", ".join(own))
    config.target_modules = set(own)


def _check_names(
    config: LoraConfig, linear: Mapping[str, nn.Module], model: PreTrainedModel
) -> None:
    targets, excluded, kind = config.target_modules, config.exclude_modules, model.config.model_type
    short = {name.rpartition(".")[2] for name in linear}
    if (
        isinstance(targets, str)
        and targets != "all-linear"
        and not any(_matches(targets, name, "target_modules") for name in linear)
    ):
        raise InputError(
            f"lora_config.target_modules {targets!r} matches no linear layer of {kind}; it "
            f"has: {', '.join(sorted(short))}. Give a list of names, a regular expression, or "
            "all-linear."
        )
    for target in sorted(targets) if isinstance(targets, (set, list)) else ():
        if not any(_ends(name, target) for name in linear):
            raise InputError(
                unknown(f"target module of {kind}", target, short)
                + f" All: model.lora_config.target_modules=[{','.join(default_targets(model))}]."
            )
    if isinstance(excluded, str) and not any(
        _matches(excluded, name, "exclude_modules") for name in linear
    ):
        raise InputError(
            f"lora_config.exclude_modules {excluded!r} matches no linear layer of {kind}; it "
            f"has: {', '.join(sorted(short))}. Give a list of names or a regular expression."
        )
    for name in sorted(excluded) if isinstance(excluded, (set, list)) else ():
        if not any(_ends(other, name) for other in linear):
            raise InputError(unknown(f"excluded module of {kind}", name, short))


def _matches(pattern: str, name: str, key: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise InputError(
            f"lora_config.{key} {pattern!r} is not a regular expression: {error}."
        ) from error


def _leave_out_other_senses(config: LoraConfig, model: PreTrainedModel) -> None:
    """Exclude what is beside the decoder, such as a vision tower: nothing here trains it."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if decoder is None or decoder is model or not hasattr(model.config, "text_config"):
        return
    inside = {id(module) for module in decoder.modules()} | {id(head)}
    beside: list[str] = []
    for name, module in model.named_modules():
        holds = any(id(inner) in inside for inner in module.modules())
        if not holds and not any(name.startswith(f"{above}.") for above in beside):
            beside.append(name)
    linear = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    beside = [b for b in beside if any(n == b or n.startswith(f"{b}.") for n in linear)]
    if not beside:
        return
    excluded = config.exclude_modules
    if isinstance(excluded, (set, list)):
        excluded = "|".join(rf"(.*\.)?{re.escape(name)}" for name in sorted(excluded))
    whole = "|".join(re.escape(name) for name in beside)
    config.exclude_modules = rf"({whole})(\..*)?" + (f"|{excluded}" if excluded else "")


def _tried(config: LoraConfig, model: PreTrainedModel) -> PeftModel:
    """The model without weights with the adapter on it.

    Raises:
        InputError: peft cannot put it there.
    """
    tried = copy.deepcopy(config)
    if tried.init_lora_weights in STARTS_FROM_WEIGHTS:
        tried.init_lora_weights = True  # they are made later, from weights
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return PeftModelForCausalLM(model, tried, low_cpu_mem_usage=True)
        except Exception as error:  # peft fails in ways of its own
            text = shortened(error)
            if "lora_dropout" in text:
                raise InputError(
                    f"model.lora_config.lora_dropout is {config.lora_dropout}, but the experts of "
                    f"a {model.config.model_type} are adapted as parameters, which have no "
                    "dropout. Set model.lora_config.lora_dropout=0, or name other modules in "
                    "model.lora_config.target_modules, such as [q_proj,v_proj]."
                ) from error
            if isinstance(targets := config.target_modules, str) and "not supported" in str(error):
                raise InputError(_too_much(targets, model)) from error
            raise InputError(
                f"model.lora_config does not fit a {model.config.model_type}: {text}. Change its "
                "target_modules, exclude_modules or what is named there."
            ) from error


def _too_much(pattern: str, model: PreTrainedModel) -> str:
    """The message for a regular expression that also matches what no adapter can be on."""
    linear = (nn.Linear, Conv1D, nn.Embedding)
    modules = {n: m for n, m in model.named_modules() if n and re.fullmatch(pattern, n)}
    other = sorted({type(m).__name__ for m in modules.values() if not isinstance(m, linear)})
    short = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, linear[:2])}
    return (
        f"model.lora_config.target_modules {pattern!r} also matches modules that are no linear "
        f"layers ({', '.join(other)}). Give target_modules=all-linear, or a regular expression or "
        f"a list for some of: {', '.join(sorted(short))}."
    )


def _check_layers(config: LoraConfig, linear: Mapping[str, nn.Module]) -> None:
    wanted, targets = config.layers_to_transform, config.target_modules
    layers = {
        int(number)
        for name in linear
        if not isinstance(targets, (set, list)) or any(_ends(name, target) for target in targets)
        for number in re.findall(r"\.(\d+)\.", name)[:1]
    }
    for index in [wanted] if isinstance(wanted, int) else wanted or ():
        if index not in layers:
            raise InputError(
                f"model.lora_config.layers_to_transform names layer {index}, but layers with a "
                f"target module are {min(layers, default=0)} to {max(layers, default=0)}. Layers "
                "are counted from 0."
            )


def _check_all_are_used(config: LoraConfig, places: Mapping[str, LoraLayer]) -> None:
    targets = config.target_modules
    for target in sorted(targets) if isinstance(targets, (set, list)) else ():
        if not any(_ends(path, target) for path in places):
            raise InputError(
                f"model.lora_config.target_modules names {target!r}, and what else is set "
                "(exclude_modules, layers_to_transform, layers_pattern) leaves all of it out. "
                "Leave out one of the two."
            )
    for parameter in config.target_parameters or ():
        if not any(_ends(path, parameter) for path in places):
            raise InputError(
                f"model.lora_config.target_parameters names {parameter!r}, which is no parameter "
                "of this model. Name it as model.named_parameters() does."
            )


def _check_patterns(model: PeftModel, places: Mapping[str, LoraLayer]) -> None:
    config = model.peft_config["default"]
    for pattern in PATTERNS:
        for key in getattr(config, pattern) or {}:
            try:
                fits = any(_fits(key, path) for path in places)
            except re.error as error:
                raise InputError(
                    f"lora_config.{pattern} {key!r} is not a regular expression: {error}."
                ) from error
            if not fits:
                short = {path.rpartition(".")[2] for path in places}
                raise InputError(unknown(f"key of model.lora_config.{pattern}", key, short))
    if wrong := ambiguous_pattern(model, "default"):
        raise InputError(
            f"model.lora_config.{wrong}. Which of them is taken would depend on their order, "
            "which is not kept. Leave one out, or write keys that do not overlap."
        )


def tell_of_full_rank(model: PeftModel, adapter: str) -> None:
    """Say where an adapter has a higher rank than any change of the weight can have."""
    places = adapted_places(model, adapter)
    full = {
        path: min(layer.in_features, layer.out_features)
        for path, layer in places.items()
        if layer.r[adapter] > min(layer.in_features, layer.out_features)
    }
    if full:
        path = next(iter(full))
        logger.warning(
            "model.lora_config.r is %d, and a change of %s has no rank above %d: on %d of its %d "
            "places the adapter is larger than it need be",
            places[path].r[adapter], path, full[path], len(full), len(places),
        )  # fmt: skip
