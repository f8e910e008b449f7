"""Make the embedded benchmark: a small TOFU that needs no download.

Authors who do not exist, with rows in TOFU's schema under TOFU's names, and a small base model that
knows other authors of the same world and some facts that are really true.

    words -> world -> splits to learn, forget and be tested on
                   -> base: tokenizer and model, pre-trained on what no split of authors holds
"""

from functools import cache
from pathlib import Path

from unlora.data.pocket import base
from unlora.data.pocket.world import Row
from unlora.data.pocket.world import splits as _splits
from unlora.errors import InputError
from unlora.registry import unknown

SPLITS = (
    "full",
    "retain90",
    "retain95",
    "retain99",
    "forget01",
    "forget05",
    "forget10",
    "holdout01",
    "holdout05",
    "holdout10",
    "forget01_perturbed",
    "forget05_perturbed",
    "forget10_perturbed",
    "retain_perturbed",
    "real_authors",
    "real_authors_perturbed",
    "world_facts",
    "world_facts_perturbed",
)

_all_rows = cache(_splits)


def rows(split: str) -> list[Row]:
    """The rows of one split.

    Raises:
        InputError: there is no such split.
    """
    if split not in SPLITS:
        raise InputError(unknown("split of pocket", split, SPLITS))
    return _all_rows()[split]


def base_model() -> Path:
    """The folder of the base model, in Hugging Face's format; trained on first use."""
    return base.cached(base.Settings())
