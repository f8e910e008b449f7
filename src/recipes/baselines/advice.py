"""Say how a missing retain model or target can be made: the command."""

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from unlora.config.resolve import shipped
from unlora.config.schema import Config
from unlora.recipes.run_history import History

TOFU = "locuslab/TOFU"


def how_to_make_gold(config: Config, suite: str, history: History) -> str | None:
    """The command that trains a model without the forget data, and the override that names it.

    None for a suite whose model learns nothing here.
    """
    settings = config.eval[suite]
    makers = {"TOFUEvaluator": _tofu, "MUSEEvaluator": _muse}
    maker = makers.get(settings["handler"])
    if maker is None:
        return None
    benchmark, task, words = maker(config, settings)
    lora = config.model.use_lora if history.uses_lora is None else history.uses_lora
    words = [
        "python src/train.py --config-name=train",
        f"experiment=finetune/{benchmark}/{'lora' if lora else 'default'}",
        *_model(config, history, lora),
        *words,
        *_paths(config),
        f"task_name={task}",
    ]
    made = Path(config.paths.root_dir) / "saves" / "finetune" / task
    return f"Make one with `{' '.join(words)}`, then add retain_logs_path={made}"


def _tofu(config: Config, settings: Mapping[str, Any]) -> tuple[str, str, list[str]]:
    forget = str(settings.get("forget_split") or config.forget_split)
    percent = re.fullmatch(r"forget(\d\d)", forget)
    retain = f"retain{100 - int(percent[1]):02}" if percent else config.retain_split or "SPLIT"
    path = str(settings.get("path") or TOFU)
    benchmark, data = ("pocket", "POCKET_QA_full") if path == "pocket" else ("tofu", "TOFU_QA_full")
    words = [f"data.train.{data}.args.hf_args.name={retain}"]
    if path not in ("pocket", TOFU):
        words += [f"data.train.{data}.args.hf_args.path={path}", f"eval.tofu.path={path}"]
    for key, default in (("forget_split", "forget10"), ("holdout_split", "holdout10")):
        if settings.get(key, default) != default:
            words.append(f"{key}={settings[key]}")
    return benchmark, retain, words


def _muse(config: Config, settings: Mapping[str, Any]) -> tuple[str, str, list[str]]:
    split = str(settings.get("data_split") or config.data_split)
    return "muse", f"muse_{split}_retain", [f"data_split={split}", "data_sub_set=retain"]


def _model(config: Config, history: History, lora: bool) -> list[str]:
    """The overrides that choose the model to train, as far as it is known."""
    first = history.runs[-1][1]["model"] if history.runs else {}
    tokenizer = _path(first, "tokenizer_args") or _path(dict(config.model), "tokenizer_args")
    base, words = None, []
    for name, content in _models().items():
        if tokenizer and tokenizer == _path(content, "tokenizer_args"):
            base = _path(content, "model_args")
            words = [f"model={name}{'-lora' if lora else ''}"]
    if not words and tokenizer:
        words = [f"model.tokenizer_args.pretrained_model_name_or_path={tokenizer}"]
    model = config.model.model_args["pretrained_model_name_or_path"]
    known = bool(history.runs) or config.mode == "finetune" or history.origin != model
    if known and history.origin != base:
        words.append(f"model.model_args.pretrained_model_name_or_path={history.origin}")
    elif base is None:
        words.append("model.model_args.pretrained_model_name_or_path=BASE_MODEL")
    return words


def _models() -> dict[str, Any]:
    """The models that come with this program, but not their variants with an adapter."""
    folder = resources.files("unlora.configs").joinpath("model")
    return {
        file.name.removesuffix(".yaml"): shipped(f"model/{file.name}")
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".yaml") and not file.name.endswith("-lora.yaml")
    }


def _path(content: Mapping[str, Any], section: str) -> str | None:
    return (content.get(section) or {}).get("pretrained_model_name_or_path")


def _paths(config: Config) -> list[str]:
    words = []
    if config.paths.root_dir != ".":
        words.append(f"paths.root_dir={config.paths.root_dir}")
    if config.paths.datasets_dir:
        words.append(f"paths.datasets_dir={config.paths.datasets_dir}")
    return words
