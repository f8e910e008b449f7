"""Models: a run folder is a model.

``get_model`` turns the section ``model`` of a config into a model and its tokenizer. With
``use_lora: true`` the model carries an adapter to train; a path to a run folder brings the adapters
of its lineage along.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from unlora.config import ModelSection, model_section
from unlora.errors import InputError
from unlora.model.guards import Probe
from unlora.model.lineage import Lineage
from unlora.model.load import attach, load_root, merge_adapters, root_config
from unlora.model.lora import LoRAModelForCausalLM
from unlora.model.tokenizer import get_tokenizer

MODEL_REGISTRY: dict[str, type] = {
    "AutoModelForCausalLM": AutoModelForCausalLM,
    "LoRAModelForCausalLM": LoRAModelForCausalLM,
}
DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
logger = logging.getLogger(__name__)


def get_model(
    model_cfg: Mapping[str, Any] | ModelSection, *, trainable: bool = True
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model and tokenizer of a config; the config is not changed.

    Args:
        model_cfg: ``model_args``, ``tokenizer_args``, ``template_args``, ``use_lora``,
            ``lora_config``, ``lineage``.
        trainable: False loads the model to be asked only: the adapters of its lineage unmerged, no
            new one.

    Raises:
        InputError: a setting is wrong, the model is out of reach, or its lineage is broken.
    """
    section = model_section(model_cfg)
    tokenizer = load_tokenizer(section)
    args = load_args(section)
    path = args.pop("pretrained_model_name_or_path")
    if section.use_lora and trainable:
        model: Any = LoRAModelForCausalLM.from_pretrained(
            path, section.lora_config, lineage=section.lineage, **args
        )
    else:
        base, lineage = load_root(Lineage.read(path), args)
        model = attach(base, lineage)
        if trainable:
            target = Probe.take(model)
            model = merge_adapters(model).requires_grad_(True)
            model.target = target
        model.lineage = lineage
    model.eval()
    _sync_special_tokens(model, tokenizer)
    return model, tokenizer


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer of a model section, without the model's weights."""
    args = load_args(section)
    path = args.pop("pretrained_model_name_or_path")
    root = Lineage.read(path).root
    return get_tokenizer(path, _resolved(section.tokenizer_args), root_config(root, args))


def load_args(section: ModelSection) -> dict[str, Any]:
    """The keyword arguments of ``from_pretrained`` that a model section stands for."""
    given: dict[str, Any] = dict(section.model_args)
    args = {key: value for key, value in given.items() if value is not None}
    name = args.pop("torch_dtype", args.pop("dtype", "auto"))
    args["dtype"] = DTYPES[name] if isinstance(name, str) else name
    args["pretrained_model_name_or_path"] = resolve(args["pretrained_model_name_or_path"])
    return args


def resolve(path: str) -> str:
    """The path of the embedded benchmark's base model; every other path as it is."""
    if path == "pocket":
        from unlora.data.pocket import base_model

        return str(base_model())
    return path


def _resolved(tokenizer_args: Mapping[str, Any] | None) -> dict[str, Any]:
    args = dict(tokenizer_args or {})
    if "pretrained_model_name_or_path" in args:
        args["pretrained_model_name_or_path"] = resolve(args["pretrained_model_name_or_path"])
    return args


def _sync_special_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for config in (base.config, base.generation_config):
        if config is not None:
            config.pad_token_id = tokenizer.pad_token_id


__all__ = ["MODEL_REGISTRY", "InputError", "LoRAModelForCausalLM", "get_model"]
