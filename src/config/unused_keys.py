"""Refuse keys that a command would not read: who gives one believes that it does something."""

import re
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from unlora.errors import InputError

# mode -> what of data.* it reads; an unlearning takes data.train where there is no data.retain
READ_DATA = {
    "finetune": ("train",),
    "unlearn": ("forget", "retain", "alternate", "train", "holdout"),
    "alternates": ("forget", "retain", "alternate"),
    "eval": ("forget", "retain", "holdout"),
}
ALL_MODES = tuple(READ_DATA)
PARTS = ("train", "forget", "retain", "alternate", "holdout", "anchor")
# section or key of a config -> the modes that use it
USED_BY = {
    "alternates": ("alternates",),
    "plan": ("eval", "finetune", "unlearn"),
    "output": ("eval",),
    "seed": ("eval",),
    "trainer": ("finetune", "unlearn", "alternates"),
    "plugin": ("finetune", "unlearn", "alternates"),
    "global_batch_size": ("finetune", "unlearn", "alternates"),
    "collator": ("finetune", "unlearn", "alternates"),
}
# named once in an experiment, used in several places of it
NAMED_ONCE = ("forget_split", "retain_split", "holdout_split", "retain_logs_path", "question_key",
              "answer_key", "data_split", "data_sub_set")  # fmt: skip


def refuse_unread(data: Mapping[str, Any], mode: Any, used: frozenset[str]) -> None:
    """Stop where data are given that nothing would look at, or that stand in for others.

    Args:
        used: keys that other parts of the config refer to, which therefore read them.

    Raises:
        InputError: there are such.
    """
    wrong = []
    for key in (key for key in data if data[key] is not None):
        file = isinstance(data[key], str)
        of_alternates = mode == "alternates" and file  # its experiments bring data sets as well
        read = ("forget",) if of_alternates else READ_DATA.get(mode, PARTS)
        if f"data.{key}" in used and not of_alternates:
            continue
        of_batches = key == "anchor" and mode != "finetune"  # the experiments of unlearning have it
        if key in PARTS and not of_batches and key not in read:
            only = " and ".join(f"data.{part}" for part in read)
            wrong.append(f"data.{key} is set, but {_named(mode)} reads {only} only. Leave it out.")
        elif key == "train" and mode == "unlearn" and (file or data.get("retain") is not None):
            wrong.append(
                "data.train is set, which an unlearning reads only where there is no data.retain. "
                "Leave it out, or call it data.retain."
            )
    if wrong:
        raise InputError("\n".join(wrong))


def _named(mode: Any) -> str:
    return {"finetune": "a fine-tuning", "eval": "an evaluation"}.get(mode, f"unlora {mode}")


def referred(cfg: Mapping[str, Any]) -> frozenset[str]:
    """Every key that an interpolation of a config names."""
    if not isinstance(cfg, DictConfig):
        return frozenset()
    text = str(OmegaConf.to_container(cfg))
    return frozenset(re.findall(r"\$\{([\w.]+)", text))


def unused(cfg: DictConfig, typed: Mapping[str, str]) -> list[str]:
    """What was typed and would change nothing, a sentence each.

    Args:
        typed: key -> value, as the command line has them.
    """
    mode, used, wrong = cfg.get("mode"), referred(cfg), []
    for key, value in typed.items():
        part = key.split(".")[0]
        own = key in ("question_key", "answer_key") and any(
            isinstance(data, str)
            for name, data in (cfg.get("data") or {}).items()
            if name != "anchor"
        )
        if part in USED_BY and mode in ALL_MODES and mode not in USED_BY[part]:
            own_seed = "alternates.seed" if mode == "alternates" else "trainer.args.seed"
            instead = f"Give {own_seed} instead" if key == "seed" else "Leave it out"
            wrong.append(f"{key} is set, but {_named(mode)} does not use it. {instead}.")
        elif key in NAMED_ONCE and value != "null" and key not in used and not own:
            wrong.append(f"{key} has no use in this experiment; it would change nothing.")
    return wrong
