"""Models: a run folder is a model.

``get_model`` turns the section ``model`` of a config into a model and its tokenizer. With
``use_lora: true`` the model carries an adapter to train; a path to a run folder brings the adapters
of its lineage along.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from unlora.config.resolve import model_section
from unlora.config.schema import ModelSection
from unlora.errors import InputError
from unlora.model.attach import check_links, load_model, merge_adapters
from unlora.model.guards import Probe
from unlora.model.lineage import Lineage
from unlora.model.load import load_args, root_config
from unlora.model.lora import LoRAModelForCausalLM, refuse_unlike
from unlora.model.quantised import check_training, quantisation, require_package
from unlora.model.run_defaults import as_trained, warn_of_other_weights
from unlora.model.targets import checked_lora_config
from unlora.model.tokenizer import load_tokenizer

MODEL_REGISTRY: dict[str, type] = {
    "AutoModelForCausalLM": AutoModelForCausalLM,
    "LoRAModelForCausalLM": LoRAModelForCausalLM,
}


def get_model(
    model_cfg: Mapping[str, Any] | ModelSection, *, trainable: bool = True
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model and tokenizer of a config; the config is not changed.

    Args:
        model_cfg: ``model_args``, ``tokenizer_args``, ``template_args``, ``use_lora``,
            ``lora_config``, ``lineage``, ``as_trained``.
        trainable: False loads the model to be asked only: the adapters of its lineage unmerged, no
            new one.

    Raises:
        InputError: a setting is wrong, the model is out of reach, or its lineage is broken.
    """
    section = as_trained(model_section(model_cfg))
    lineage = check_model(section) if trainable else None
    tokenizer = load_tokenizer(section)
    args = load_args(section)
    path = args.pop("pretrained_model_name_or_path")
    lineage = lineage or Lineage.read(path, section.base)
    warn_of_other_weights(lineage, args.get("quantization_config"))
    if section.use_lora and trainable:
        model: Any = LoRAModelForCausalLM.from_pretrained(
            path, section.lora_config, lineage=section.lineage, base=section.base, **args
        )
    else:
        model, lineage = load_model(lineage, args)
        if trainable:
            target = Probe.of(model)
            model = merge_adapters(model).requires_grad_(True)
            model.target = target
        model.lineage = lineage
    model.eval()
    _sync_special_tokens(model, tokenizer)
    return model, tokenizer


def check_model(section: ModelSection, *, by: Iterable[str] = ()) -> Lineage:
    """Find what is wrong with a model section before data are read or weights are loaded.

    Args:
        by: the method and its plug-ins.

    Returns:
        The lineage that training would start from.

    Raises:
        InputError: the model is out of reach, its lineage is broken, or an adapter does not fit.
    """
    args = load_args(as_trained(section))
    lineage = Lineage.read(args["pretrained_model_name_or_path"], section.base)
    architecture, trust = root_config(lineage, args), bool(args.get("trust_remote_code"))
    check_links(lineage, architecture, trust=trust)
    quantised = quantisation(architecture, args, lineage.root)
    check_training(quantised, section, merges=bool(lineage.links), by=by)
    require_package(quantised)
    if section.use_lora and section.lineage != "continue":
        config = checked_lora_config(dict(section.lora_config), architecture, trust=trust)
        refuse_unlike(lineage, config)
    elif section.lineage == "continue" and not section.use_lora:
        raise InputError(
            "model.lineage is 'continue', which trains an adapter further, but model.use_lora is "
            "false. Set model.use_lora=true."
        )
    return lineage


def _sync_special_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for config in (base.config, base.generation_config):
        if config is not None:
            config.pad_token_id = tokenizer.pad_token_id


__all__ = [
    "MODEL_REGISTRY",
    "LoRAModelForCausalLM",
    "as_trained",
    "check_model",
    "get_model",
    "load_args",
    "load_tokenizer",
]
