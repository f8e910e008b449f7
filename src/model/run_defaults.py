"""Complete a model section with the defaults of the run that trained the model.

A run folder says in ``run_config.json`` with which template, tokenizer and dtype it was trained;
another folder or a repository has at least a tokenizer, which may have a chat template.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unlora.config.resolve import section_as_written, shipped
from unlora.config.schema import ModelSection
from unlora.errors import InputError
from unlora.model.lineage import Lineage
from unlora.model.quantised import SETTINGS, kind
from unlora.model.resolved import ResolvedModel
from unlora.model.tokenizer import load_tokenizer
from unlora.runs.safe_loading import read_json

RUN = "run_config.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
# settings of a run without which its model answers differently; never trust_remote_code, which
# is for the user to say and not for a folder
QUANTISED = "quantization_config"
OF_MODEL = ("torch_dtype", "dtype", "rope_scaling", "attn_implementation", QUANTISED)
OF_TOKENIZER = ("use_fast", "legacy", "add_bos_token", "add_eos_token", "model_max_length")
logger = logging.getLogger(__name__)


def with_run_defaults(model: ResolvedModel) -> ResolvedModel:
    """Fill in what a section leaves open: template, tokenizer and dtype of the model's training.

    They are those of the last run in the lineage that says so. Without one, the template is the
    tokenizer's own, or else ``configs/template/question-answer.yaml``, and the dtype that of the
    weights. What the section sets itself stays.

    Raises:
        InputError: the model or its tokenizer is out of reach, or a run folder is damaged.
    """
    section, path, lineage = model.section, model.path, model.lineage
    folders = _folders(path, lineage)
    run, trained = _last_run(folders)
    home = next((str(f) for f in folders if any((f / x).is_file() for x in TOKENIZER)), None)
    tokenizer_args = {
        "pretrained_model_name_or_path": home or lineage.root,
        **(trained.tokenizer_args if trained else {}),
        **section.tokenizer_args,
    }
    settings = {"as_trained": False, "tokenizer_args": tokenizer_args, **_loaded(section, trained)}
    section = section.model_copy(update=settings)
    if trained:
        template, why = dict(trained.template_args), f"that of the run {run}"
    elif section.template_args.get("apply_chat_template", True) and _can_chat(section, lineage):
        template, why = {"apply_chat_template": True}, "its tokenizer's own"
    else:
        template = dict(shipped("template/question-answer.yaml"))
        why = "'Question: ... Answer: ...', as neither a run nor its tokenizer has another"
    if section.template_args:
        why += f", with {', '.join(section.template_args)} as set"
    logger.info("%s is asked in this template: %s", path, why)
    template_args = {**template, **section.template_args}
    return ResolvedModel(section.model_copy(update={"template_args": template_args}), lineage)


def _loaded(section: ModelSection, trained: ModelSection | None) -> dict[str, Any]:
    """``model_args`` and ``quantisation``: those of the run, with what the section sets."""
    args: dict[str, Any] = dict(trained.model_args) if trained else {}
    quantisation = trained.quantisation if trained else None
    if "quantisation" in section.model_fields_set:
        quantisation = section.quantisation
        args.pop(QUANTISED, None)
    elif QUANTISED in section.model_args:
        quantisation = None
    attention = section.model_args.get("attn_implementation") or args.get("attn_implementation")
    own = dict(section.model_args)
    if own.get("torch_dtype") is None:  # null: as the run had it
        own.pop("torch_dtype", None)
    args.update(own)
    if attention:  # `model=PATH` leaves it open
        args["attn_implementation"] = attention
    return {"model_args": args, "quantisation": quantisation}


def warn_of_other_weights(lineage: Lineage, model_args: Mapping[str, Any] | None) -> None:
    """Say which adapters were trained on weights that were quantised otherwise than now.

    Args:
        model_args: with the settings of bitsandbytes with which the root is loaded now.
    """
    now = kind(model_args)
    for link in lineage.links:
        if (link.path / RUN).is_file():
            run = _read(link.path / RUN)
            then = kind(SETTINGS.get(str(run.quantisation)) or run.model_args.get(QUANTISED))
            if then != now:
                logger.warning(
                    "the adapter %s was trained on %s weights and is put on %s ones, so it answers "
                    "otherwise than in its run. model.quantisation=%s has it as it was",
                    link.path, then, now, then if then in SETTINGS else "null",
                )  # fmt: skip


def _folders(path: str, lineage: Lineage) -> list[Path]:
    """The folders that may say how the model was trained, the last training first."""
    own = [Path(path)] if Path(path).is_dir() else []
    below = [folder for folder in reversed(lineage.folders) if folder not in own]
    return [
        parent
        for folder in own + below
        for parent in (
            [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
        )
    ]


def _last_run(folders: Sequence[Path]) -> tuple[Path | None, ModelSection | None]:
    """The first of these folders that says how questions were put, and what it says.

    Raises:
        InputError: its file is damaged.
    """
    for folder in folders:
        if (folder / RUN).is_file():
            section = _read(folder / RUN)
            if section.template_args:
                return folder, section
    return None, None


def _read(file: Path) -> ModelSection:
    try:
        model = read_json(file).get("model") or {}
        args, tokenizer_args = model.get("model_args") or {}, model.get("tokenizer_args") or {}
        return section_as_written(
            {
                "model_args": {"pretrained_model_name_or_path": str(file.parent)} | _of_model(args),
                "tokenizer_args": _kept(tokenizer_args, OF_TOKENIZER),
                "template_args": model.get("template_args") or {},
                "quantisation": model.get("quantisation"),
            }
        )
    except (ValueError, AttributeError, InputError) as error:
        raise InputError(
            f"{file} does not say how this model was trained ({error}). Give the template "
            "yourself: model.as_trained=false and model.template_args.*."
        ) from error


def _of_model(args: Mapping[str, Any]) -> dict[str, Any]:
    of_model = _kept(args, OF_MODEL)
    if of_model.get("attn_implementation") not in (None, "eager", "sdpa"):
        del of_model["attn_implementation"]  # others are packages, or code of the hub
    return of_model


def _kept(args: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: args[key] for key in keys if args.get(key) is not None}


def _can_chat(section: ModelSection, lineage: Lineage) -> bool:
    return bool(load_tokenizer(ResolvedModel(section, lineage)).chat_template)
