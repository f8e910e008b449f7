"""Find the largest micro-batch of each part: the longest rows, and most scored tokens."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unlora.config.schema import Config, ModelSection
from unlora.data import load_part
from unlora.data.chat_encoding import Chat, Encoded
from unlora.errors import InputError
from unlora.forward import IGNORE_INDEX
from unlora.model import load_tokenizer, resolve_model

LENGTH = 512  # tokens of a row, where neither data nor a max_length say more


@dataclass(frozen=True)
class Batch:
    """The largest micro-batch of one part of the data.

    Attributes:
        tokens: of its longest row; every row is padded to that.
        scored: tokens that are predicted, of all its rows.
        mean: tokens of a row of this part, on average.
    """

    rows: int
    tokens: int
    scored: int
    mean: float = 0.0


def largest_batches(
    config: Config, section: ModelSection, parts: Sequence[str], rows: int | None = None
) -> tuple[dict[str, Batch], str]:
    """The largest micro-batch of each part, and where that is known from.

    Args:
        section: with the defaults of the run that trained the model.
        rows: of a micro-batch, where it is not to be the config's.
    """
    rows = rows or int(config.trainer.args.get("per_device_train_batch_size") or 8)
    sources = {part: _data_sets(config, part) for part in parts}
    model, folder = section.model_dump_json(), config.paths.datasets_dir
    try:
        batches = {
            part: largest(_lengths(json.dumps(x, sort_keys=True, default=str), model, folder), rows)
            for part, x in sources.items()
        }
        return batches, "the longest rows of the data"
    except InputError as error:
        batches = {part: _of_max_length(x, rows) for part, x in sources.items()}
        return batches, f"max_length, as the data cannot be read: {error}"


def _data_sets(config: Config, part: str) -> dict[str, Any]:
    stands_in = {"retain": "train", "alternate": "forget"}.get(part, part)
    data: Any = config.data.get(part) or config.data.get(stands_in) or {}
    return data


def _of_max_length(sources: dict[str, Any], rows: int) -> Batch:
    limits = [(source or {}).get("args", {}).get("max_length") for source in sources.values()]
    longest = max((limit for limit in limits if limit), default=LENGTH)
    return Batch(rows, longest, rows * longest, longest)


def largest(lengths: Sequence[tuple[int, int]], rows: int) -> Batch:
    """The largest micro-batch of rows of these tokens, and scored tokens."""
    scored = sorted((scored for _, scored in lengths), reverse=True)[:rows]
    tokens = [tokens for tokens, _ in lengths]
    return Batch(len(scored), max(tokens), sum(scored), sum(tokens) / len(tokens))


def size_of(row: Encoded) -> tuple[int, int]:
    """The tokens of a row, and how many of them are scored."""
    return len(row.input_ids), sum(label != IGNORE_INDEX for label in row.labels[1:])


@functools.lru_cache(maxsize=64)
def _lengths(sources: str, model: str, datasets_dir: str | None) -> list[tuple[int, int]]:
    """Of every row, its tokens and how many of them are scored."""
    resolved = resolve_model(ModelSection.model_validate_json(model))
    chat = Chat(load_tokenizer(resolved), resolved.section.template_args)
    encoded = load_part(json.loads(sources), chat, datasets_dir=datasets_dir)
    return [size_of(row) for row in encoded]
