"""Load the tokenizer that belongs to a model."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import (
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from unlora.errors import InputError
from unlora.model.lineage import looks_local
from unlora.model.load import HUB, NEEDS_CODE, resolve, shortened
from unlora.model.resolved import ResolvedModel

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
RUN_FILES = ("lineage.json", "manifest.json", "run_config.json")


def load_tokenizer(model: ResolvedModel) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, without the model's weights."""
    args, architecture = model.load_kwargs, model.architecture
    hub = {key: args[key] for key in HUB if key in args and key != "revision"}
    settings = _resolved(model.section.tokenizer_args)
    tokenizer = get_tokenizer(model.path, hub | settings, architecture)
    context = None if args.get("rope_scaling") else context_length(architecture)
    if context and not settings.get("model_max_length"):
        tokenizer.model_max_length = context  # what the files of tokenizers say is often wrong
    return tokenizer


def context_length(config: PretrainedConfig) -> int | None:
    """How many tokens a model reads; None where it knows no end, or is stretched beyond it."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    stretched = isinstance(rope, Mapping) and "factor" in rope
    length = getattr(text, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 and not stretched else None


def get_tokenizer(
    model_path: str,
    tokenizer_args: Mapping[str, Any] | None = None,
    config: PretrainedConfig | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a pad token.

    A run folder carries the tokenizer it was trained with; that one is taken, unless
    ``tokenizer_args`` names another folder. For every other model, ``tokenizer_args`` decides.

    Args:
        config: of the model, to check that every token has an embedding.

    Raises:
        InputError: there is no tokenizer, or it has more tokens than the model.
    """
    args = {"trust_remote_code": False, **(tokenizer_args or {})}
    named = args.pop("pretrained_model_name_or_path", None) or model_path
    if looks_local(named) and not os.path.exists(named):
        raise InputError(
            f"There is no folder {named!r} to load a tokenizer from. "
            "Set model.tokenizer_args.pretrained_model_name_or_path."
        )
    path = model_path if _brings_tokenizer(model_path) and not os.path.isdir(named) else named
    try:
        tokenizer = _from_files(path, args)
    except Exception as error:  # files of others fail in ways of their own
        if "trust_remote_code" in str(error):
            what = f"code of its own for the tokenizer {path!r} (auto_map in its files)"
            raise InputError(NEEDS_CODE.format(root=model_path, what=what)) from error
        what = f"No tokenizer could be loaded from {path!r}"
        if os.path.isdir(path) and not any((Path(path) / name).is_file() for name in FILES):
            what += f": the folder has none of {', '.join(FILES)}"
        else:
            what += f": {shortened(error)}"
        raise InputError(
            f"{what}. Set model.tokenizer_args.pretrained_model_name_or_path."
        ) from error
    if tokenizer.pad_token_id is None:
        # nothing is added to the vocabulary: masks come from lengths, so any token can pad
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if config is not None:
        size = config.get_text_config().vocab_size
        largest = max(tokenizer.get_vocab().values())
        if largest >= size:
            raise InputError(
                f"The tokenizer {path!r} has token ids up to {largest}, but the model "
                f"{model_path!r} has {size} embeddings. Give the tokenizer of this model: "
                "model.tokenizer_args.pretrained_model_name_or_path."
            )
    return tokenizer


def _from_files(path: str, args: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Load a tokenizer, by transformers 4 also from files that transformers 5 has written."""
    try:
        return AutoTokenizer.from_pretrained(path, **args)
    except (AttributeError, ValueError):
        written = get_tokenizer_config(path, **args)
        special = written.get("extra_special_tokens")
        if int(transformers.__version__.split(".")[0]) > 4 or not isinstance(special, list | None):
            raise
        new_name = written.get("tokenizer_class") == "TokenizersBackend"
        loader = PreTrainedTokenizerFast if new_name else AutoTokenizer
        renamed = {"extra_special_tokens": {}, "additional_special_tokens": special or []}
        return loader.from_pretrained(path, **args, **renamed)


def _resolved(tokenizer_args: Mapping[str, Any] | None) -> dict[str, Any]:
    args = dict(tokenizer_args or {})
    if "pretrained_model_name_or_path" in args:
        args["pretrained_model_name_or_path"] = resolve(args["pretrained_model_name_or_path"])
    return args


def _brings_tokenizer(model_path: str) -> bool:
    """Whether this is a run folder, or a checkpoint in one, with the tokenizer of its training."""
    folder = Path(model_path)
    places = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
    is_run = any((parent / name).is_file() for parent in places for name in RUN_FILES)
    return is_run and (folder / "tokenizer_config.json").is_file()
