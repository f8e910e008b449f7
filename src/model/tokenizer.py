"""The tokenizer that belongs to a model."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from unlora.errors import InputError

logger = logging.getLogger(__name__)


def get_tokenizer(
    model_path: str,
    tokenizer_args: Mapping[str, Any] | None = None,
    config: PretrainedConfig | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a pad token.

    A run folder carries the tokenizer it was trained with; that one is taken, unless
    ``tokenizer_args`` names another folder.

    Args:
        config: of the model, to check that every token has an embedding.

    Raises:
        InputError: there is no tokenizer, or it has more tokens than the model.
    """
    args = dict(tokenizer_args or {})
    path = args.pop("pretrained_model_name_or_path", None)
    if (Path(model_path) / "tokenizer_config.json").is_file() and not os.path.isdir(path or ""):
        path = model_path
    path = path or model_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **args)
    except (OSError, ValueError) as error:
        raise InputError(
            f"No tokenizer could be loaded from {path!r}: {str(error).splitlines()[0]} "
            "Set model.tokenizer_args.pretrained_model_name_or_path."
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
