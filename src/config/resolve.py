"""Resolve interpolations, shipped defaults and sections to plain values."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import resources
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from unlora.config.schema import ModelSection
from unlora.config.validation import checked
from unlora.errors import InputError
from unlora.runs.redaction import without_setting

UNRESOLVED = {  # what OmegaConf says of a ${...} -> what is wrong with the key
    r"Interpolation key '(.+?)' not found": "refers to {}, and the config has no such key. Write "
    "the value, or a key that is there; a variable of the shell stands outside of single quotes.",
    "Recursive interpolation()": "refers to itself, maybe through other keys. Write the value.",
    r"Unsupported interpolation type (\S+)": "asks for {}, and there is no such resolver. Write "
    "the value.",
}


def plain(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in plain Python with every interpolation resolved.

    Raises:
        InputError: a value is missing, or refers to something that is not there.
    """
    try:
        if not isinstance(cfg, DictConfig):
            cfg = OmegaConf.create(dict(cfg), flags={"allow_objects": True})
        missing = list(_missing(OmegaConf.to_container(cfg)))
        if missing:
            raise InputError("\n".join(f"{key} has no value. Give {key}=..." for key in missing))
        with without_environment():
            content: Any = OmegaConf.to_container(cfg, resolve=True)
        return content
    except OmegaConfBaseException as error:
        if isinstance(error, InterpolationKeyError) and "targets." in str(error):
            raise InputError(
                "No published model that knows these facts is listed for this model. Fine-tune "
                "one and give its run folder: model.model_args.pretrained_model_name_or_path=..."
            ) from error
        raise InputError(resolution_mistake(error) or " ".join(str(error).split())) from error


def _missing(content: Any, above: str = "") -> Iterator[str]:
    """The keys whose value is still ``???``."""
    pairs = content.items() if isinstance(content, Mapping) else ()
    for key, value in pairs:
        if value == "???":
            yield f"{above}{key}"
        yield from _missing(value, f"{above}{key}.")


@contextmanager
def without_environment() -> Iterator[None]:
    """No value of a config is read from the environment: it would be written with the config."""
    from omegaconf.resolvers import oc

    def refuse(name: str, *_: Any) -> None:
        raise InputError(
            f"${{oc.env:{name}}} would read a variable of the environment into a config, which is "
            "written beside the results. Have the shell do it: KEY=$" + name
        )

    OmegaConf.register_new_resolver("oc.env", refuse, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, use_cache=False, replace=True)


def resolution_mistake(error: BaseException, words: Sequence[str] = ()) -> str | None:
    """What is wrong with a ``${...}``: what a resolver of ours said, or that it leads nowhere.

    Args:
        words: the overrides of the command line, which OmegaConf does not name.
    """
    key = getattr(error, "full_key", None)
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, InputError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return _unresolved(str(error).partition("\n")[0], key, words)
    return f"{key}: {cause}" if key else str(cause)


def _unresolved(message: str, key: str | None, words: Sequence[str]) -> str | None:
    for pattern, why in UNRESOLVED.items():
        if match := re.search(pattern, message):
            typed = [word.lstrip("+") for word in words if "${" in word and match[1] in word]
            typed.sort(key=lambda word: f"${{{word.partition('=')[0]}}}" not in word)
            return f"{without_setting(typed[0]) if typed else key} {why.format(match[1])}"
    return None


@cache
def shipped(file: str) -> Mapping[str, Any]:
    """What one of our configs without references to others says, e.g. ``lora/default.yaml``."""
    text = resources.files("unlora.configs").joinpath(file).read_text("utf-8")
    content: Any = OmegaConf.to_container(OmegaConf.create(text))
    return content


def with_lora_default(model: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the shipped settings of LoRA that a model section leaves open."""
    lora = model.get("lora_config")
    if lora is None or isinstance(lora, Mapping):
        lora = {**shipped("lora/default.yaml"), **(lora or {})}
    return {**model, "lora_config": lora}


def model_section(cfg: Mapping[str, Any] | ModelSection) -> ModelSection:
    """The checked section ``model`` of a config.

    Raises:
        InputError: every mistake found, one a line.
    """
    if isinstance(cfg, ModelSection):
        return cfg
    return checked(ModelSection, with_lora_default(plain(cfg)), "model")


def section_as_written(content: Mapping[str, Any]) -> ModelSection:
    """The checked section ``model`` of a file that a run left, in which ``${...}`` is only text.

    Raises:
        InputError: every mistake found, one a line.
    """
    return checked(ModelSection, with_lora_default(content), "model")
