"""Load models: a run folder is a model.

``get_model`` turns the section ``model`` of a config into a model and its tokenizer. With
``use_lora: true`` the model carries an adapter to train; a path to a run folder brings the adapters
of its lineage along.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unlora.model.lora import LoRAModelForCausalLM
    from unlora.model.model_registry import MODEL_REGISTRY, check_model, get_model, resolve_model
    from unlora.model.resolved import ResolvedModel
    from unlora.model.tokenizer import load_tokenizer

__all__ = [
    "MODEL_REGISTRY",
    "LoRAModelForCausalLM",
    "ResolvedModel",
    "check_model",
    "get_model",
    "load_tokenizer",
    "resolve_model",
]


def __getattr__(name: str) -> Any:
    # what reads a lineage only must not wait for torch
    if name in __all__:
        return getattr(import_module("unlora.model.model_registry"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
