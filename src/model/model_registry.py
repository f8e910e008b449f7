"""Turn the section ``model`` of a config into a model and its tokenizer."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from unlora.config.resolve import model_section
from unlora.config.schema import ModelSection
from unlora.errors import InputError
from unlora.model.attach import check_links, load_model
from unlora.model.lora import LoRAModelForCausalLM, load_with_adapter, refuse_unlike
from unlora.model.merge import merge_adapters
from unlora.model.probe import Probe
from unlora.model.quantised import check_training, require_package
from unlora.model.resolved import ResolvedModel
from unlora.model.run_defaults import warn_of_other_weights, with_run_defaults
from unlora.model.targets import checked_lora_config
from unlora.model.tokenizer import load_tokenizer

MODEL_REGISTRY: dict[str, type] = {
    "AutoModelForCausalLM": AutoModelForCausalLM,
    "LoRAModelForCausalLM": LoRAModelForCausalLM,
}


def resolve_model(model_cfg: Mapping[str, Any] | ModelSection | ResolvedModel) -> ResolvedModel:
    """Understand the section ``model`` of a config; the config is not changed.

    Raises:
        InputError: a setting is wrong; or ``as_trained`` is set, and the model is out of reach.
    """
    if isinstance(model_cfg, ResolvedModel):
        return model_cfg
    resolved = ResolvedModel(model_section(model_cfg))
    return with_run_defaults(resolved) if resolved.section.as_trained else resolved


def get_model(
    model_cfg: Mapping[str, Any] | ModelSection | ResolvedModel, *, trainable: bool = True
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load the model and tokenizer of a config; the config is not changed.

    Args:
        model_cfg: ``model_args``, ``tokenizer_args``, ``template_args``, ``use_lora``,
            ``lora_config``, ``lineage``, ``as_trained``.
        trainable: False loads the model to be asked only: the adapters of its lineage unmerged, no
            new one.

    Raises:
        InputError: a setting is wrong, the model is out of reach, or its lineage is broken.
    """
    resolved = resolve_model(model_cfg)
    if trainable:
        check_model(resolved)
    tokenizer = load_tokenizer(resolved)
    warn_of_other_weights(resolved.lineage, resolved.load_kwargs.get("quantization_config"))
    if resolved.section.use_lora and trainable:
        model: Any = load_with_adapter(resolved)
    else:
        model, lineage = load_model(resolved.lineage, resolved.load_kwargs)
        if trainable:
            target = Probe.of(model)
            model = merge_adapters(model).requires_grad_(True)
            model.target = target
        model.lineage = lineage
    model.eval()
    _sync_special_tokens(model, tokenizer)
    return model, tokenizer


def check_model(
    model_cfg: Mapping[str, Any] | ModelSection | ResolvedModel, *, by: Iterable[str] = ()
) -> ResolvedModel:
    """Find what is wrong with a model before data are read or weights are loaded.

    Args:
        by: the method and its plug-ins.

    Returns:
        The model, resolved.

    Raises:
        InputError: the model is out of reach, its lineage is broken, or an adapter does not fit.
    """
    resolved = resolve_model(model_cfg)
    section, lineage, trust = resolved.section, resolved.lineage, resolved.trusts_code
    check_links(lineage, resolved.architecture, trust=trust)
    check_training(resolved.quantised, section, merges=bool(lineage.links), by=by)
    require_package(resolved.quantised)
    if section.use_lora and section.lineage != "continue":
        config = checked_lora_config(dict(section.lora_config), resolved.architecture, trust=trust)
        refuse_unlike(lineage, config)
    elif section.lineage == "continue" and not section.use_lora:
        raise InputError(
            "model.lineage is 'continue', which trains an adapter further, but model.use_lora is "
            "false. Set model.use_lora=true."
        )
    return resolved


def _sync_special_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for config in (base.config, base.generation_config):
        if config is not None:
            config.pad_token_id = tokenizer.pad_token_id
