"""Evaluate the retain model or the target where they have no log yet."""

import gc
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from unlora.config.schema import Config, ModelSection
from unlora.errors import InputError
from unlora.evals import LazyModel, build_suites, evaluate_all
from unlora.evals.eval_model import NO_ADAPTERS
from unlora.evals.passes.batching import rank_and_size
from unlora.model import ResolvedModel, get_model, load_tokenizer, resolve_model
from unlora.model.fingerprints import identities
from unlora.model.guards import evaluation_is_pure
from unlora.model.probe import Probe
from unlora.results.baseline_log import KEYS
from unlora.runs.run import Run

RETAIN, TARGET = KEYS["reference"], KEYS["target"]
# they belong to the repository that is evaluated, not to that of its reference
OF_A_REPOSITORY = ("revision", "subfolder", "variant")
ITSELF = "None is needed: this model is a reference itself"


def evaluate(config: Config, model: str, folders: Mapping[str, Path]) -> None:
    """Evaluate a model with some suites, each into its folder; the model is gone afterwards."""
    resolved = resolve_model(section_with(config.model, model))
    itself = {"advice": ITSELF, "missed": False}
    of_reference = {RETAIN: itself, TARGET: itself, "overwrite": True}
    wanted = {
        suite: {**config.eval[suite], **of_reference, "output_dir": str(folder)}
        for suite, folder in folders.items()
    }
    suites = build(config, resolved, wanted)
    key, root_key = identities(resolved)
    section = resolved.section.model_dump()
    content = {**config.model_dump(), "mode": "eval", "model": section, "eval": wanted}
    records = [Run(str(folder), content, kind="eval") for folder in dict.fromkeys(folders.values())]
    with ExitStack() as guard:

        def load() -> Any:
            loaded, _ = get_model(resolved, trainable=False)
            Probe.take(loaded)  # NaN is no reference, and nothing to train
            guard.enter_context(evaluation_is_pure(loaded))
            return loaded

        subject = LazyModel(load, key, root_key, None if resolved.lineage.links else NO_ADAPTERS)
        summary = evaluate_all(suites, subject, quiet=config.output != "lines")
        del subject
    for record in records:
        record.begin(fresh=False)
        record.finish(lineage=str(resolved.lineage), summary=summary)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if rank_and_size()[1] > 1:
        dist.barrier()  # the main process has written the logs


def why_unusable(config: Config, path: str) -> str | None:
    """Why a path is no model that can be asked the same as this one, where that is so."""
    try:
        load_tokenizer(resolve_model(section_with(config.model, path)))
    except InputError as error:
        return str(error).split(". ")[0].rstrip(".")  # without what to do about the model itself
    return None


def build(config: Config, model: ResolvedModel, section: Mapping[str, Mapping[str, Any]]) -> list:
    """The suites of a section ``eval`` for a model."""
    return build_suites(
        section,
        tokenizer=load_tokenizer(model),
        template_args=model.section.template_args,
        datasets_dir=config.paths.datasets_dir,
        prepare=False,
    )


def section_with(section: ModelSection, path: str) -> ModelSection:
    """The section ``model`` with another model in it."""
    args: Any = {k: v for k, v in section.model_args.items() if k not in OF_A_REPOSITORY}
    base = section.base if path == args["pretrained_model_name_or_path"] else None
    args["pretrained_model_name_or_path"] = path
    return section.model_copy(update={"model_args": args, "base": base})


def own_path(config: Config) -> str:
    """The model of a config as it is given there."""
    return config.model.model_args["pretrained_model_name_or_path"]
