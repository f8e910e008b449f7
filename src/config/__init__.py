"""Read configs: what Hydra composed becomes a checked, frozen :class:`Config`.

``schema`` has the keys and their types, ``validation`` the sentences for wrong ones, ``checks``
what takes more than one key, ``resolve`` interpolations and shipped defaults. Mistakes are
reported together, before anything heavy is imported.
"""

import os
from collections.abc import Mapping
from typing import Any

from unlora.config.checks import (
    check_share,
    contradictions,
    with_data_sets,
    with_rows_at_once,
    with_share,
)
from unlora.config.resolve import plain, with_lora_default
from unlora.config.schema import Config
from unlora.config.unused_keys import referred, refuse_unread
from unlora.config.validation import checked
from unlora.errors import InputError


def read(cfg: Mapping[str, Any]) -> Config:
    """The checked config; ``cfg`` itself is not changed.

    Raises:
        InputError: every mistake found, one a line.
    """
    content = plain(cfg)
    if isinstance(content.get("model"), Mapping):
        content["model"] = with_lora_default(content["model"])
    if content.get("evaluate") is False:
        content["eval"] = {}
    if isinstance(content.get("data"), Mapping):
        refuse_unread(content["data"], content.get("mode"), referred(cfg))
        content["data"] = with_data_sets(content)
    config: Config = checked(Config, content)
    config = config.model_copy(update={"trainer": with_rows_at_once(config.trainer)})
    rows, processes = config.global_batch_size, int(os.environ.get("WORLD_SIZE") or 1)
    mistakes = [*contradictions(config), *check_share(rows, processes)]
    if mistakes:
        raise InputError("\n".join(mistakes))
    if rows is None:
        return config
    args = with_share(config.trainer.args, rows, processes)
    trainer = config.trainer.model_copy(update={"args": args})
    return config.model_copy(update={"trainer": trainer})
