"""LoRA on a root model, with the adapters that its lineage already has."""

import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from unlora.config import model_section, shipped
from unlora.errors import InputError
from unlora.model.default_targets import default_targets, has_experts
from unlora.model.guards import Probe
from unlora.model.lineage import ADAPTER_WEIGHTS, Lineage
from unlora.model.load import (
    attach,
    load_args,
    load_root,
    merge_adapters,
    root_config,
    without_adapters,
)
from unlora.model.quantised import check_training, count, quantisation
from unlora.model.reference import POLICY, adapters_off, freeze_reference
from unlora.model.skeleton import skeleton
from unlora.model.start import STARTS, has_start, save_with_start, start_at
from unlora.registry import unknown
from unlora.run import whole_files

logger = logging.getLogger(__name__)


class LoRAModelForCausalLM:
    """Builds a causal language model with a LoRA adapter to train.

    The result is a plain peft ``PeftModelForCausalLM`` with two attributes of ours: ``lineage``
    (what it stands on) and ``target`` (a :class:`Probe` of the model that its lineage names).
    """

    @staticmethod
    def from_pretrained(
        path_or_repo: str,
        lora_config: Mapping[str, Any] | None = None,
        *,
        lineage: str = "auto",
        **model_args: Any,
    ) -> PeftModel:
        """Load a root model or a run folder and put an adapter on it.

        Args:
            path_or_repo: hub repository, model folder, or run folder with an adapter.
            lora_config: keyword arguments of ``peft.LoraConfig``; those that are not given are the
                shipped ones (``configs/lora/default.yaml``).
            lineage: what happens to the adapters that are there already. ``merge``: into the
                weights, in memory. ``stack``: they stay beside the new one, frozen.
                ``continue``: the last one is trained further, a frozen twin is the reference.
                ``auto``: merge, or stack where the weights are quantised.
            model_args: keyword arguments of ``AutoModelForCausalLM.from_pretrained``.

        Raises:
            InputError: no such model, a link is missing or changed, or the adapter does not fit.
        """
        section = model_section(
            {
                "model_args": {"pretrained_model_name_or_path": path_or_repo, **model_args},
                "lora_config": lora_config,
                "lineage": lineage,
            }
        )
        model_args = load_args(section)
        origin = Lineage.read(model_args.pop("pretrained_model_name_or_path"))
        given = dict(section.lora_config)
        start_name = str(given.get("init_lora_weights"))
        start = STARTS.get(start_name)
        if start is not None:
            given["init_lora_weights"] = True
        architecture = root_config(origin, model_args)
        quantised = quantisation(architecture, model_args, origin.root)
        merges = lineage == "merge" and bool(origin.links)
        check_training(quantised, use_lora=True, merges=merges)
        config = checked_lora_config(given, architecture)
        if lineage == "continue":
            if not origin.links:
                raise InputError(
                    f"model.lineage is 'continue', but {path_or_repo!r} has no adapter to "
                    "continue. Give a run folder with an adapter, or leave model.lineage out."
                )
            if start is not None:
                raise InputError(
                    "model.lineage is 'continue', which trains an adapter further, but "
                    f"lora_config.init_lora_weights is {start_name}, which starts a new one. Leave "
                    "out one of the two."
                )
            logger.info("the adapter is continued with its own settings, not model.lora_config")
        base, origin = load_root(origin, model_args)
        if lineage == "auto":
            lineage = "stack" if quantised else "merge"
        model = attach(base, origin)
        target = Probe.take(model)
        if origin.links:
            with adapters_off(model):
                target = target.beside(model)
        if lineage == "continue":
            model = _continue(model, origin, merge=not quantised)
        elif lineage == "stack" and origin.links:
            model.add_adapter(POLICY, config)
            _activate_policy(model)
        else:
            model = get_peft_model(merge_adapters(model), config)
        if start is not None and lineage != "continue":
            start_at(model, start)
        kept = origin.links[:-1] if lineage == "continue" else origin.links
        model.lineage = Lineage(origin.root, kept, origin.fingerprint)
        model.target = target
        return model


def checked_lora_config(
    lora_config: Mapping[str, Any], architecture: PretrainedConfig
) -> LoraConfig:
    """A ``LoraConfig`` whose target modules exist in this architecture.

    Args:
        lora_config: keyword arguments of ``peft.LoraConfig``.

    Raises:
        InputError: settings that do not go together, or a target that matches nothing.
    """
    try:
        config = LoraConfig(**lora_config)
    except (TypeError, ValueError) as error:
        raise InputError(f"lora_config: {' '.join(str(error).split())}") from error
    targets = config.target_modules
    if targets is None or targets == "all-linear":
        return config
    model = skeleton(architecture)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    short = {name.rpartition(".")[2] for name in names}
    if isinstance(targets, str):
        try:
            matched = any(re.fullmatch(targets, name) for name in names)
        except re.error as error:
            raise InputError(
                f"lora_config.target_modules {targets!r} is not a regular expression: {error}."
            ) from error
        if not matched:
            raise InputError(
                f"lora_config.target_modules {targets!r} matches no linear layer of "
                f"{architecture.model_type}; it has: {', '.join(sorted(short))}. "
                "Give a list of names, a regular expression, or all-linear."
            )
        return config
    if set(targets) == set(shipped("lora/default.yaml")["target_modules"]):
        config.target_modules = _fitting(targets, names, model)
        return config
    for target in targets:
        if not any(_is(name, target) for name in names):
            raise InputError(
                unknown(f"target module of {architecture.model_type}", target, short)
                + f" All: model.lora_config.target_modules=[{','.join(default_targets(model))}]."
            )
    return config


def _is(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _fitting(targets: Collection[str], names: Sequence[str], model: PreTrainedModel) -> set[str]:
    """The default targets, or the architecture's own where it lacks one or has experts."""
    if not has_experts(model) and all(any(_is(n, target) for n in names) for target in targets):
        return set(targets)
    own = default_targets(model)
    logger.info("the adapter of a %s is on its %s", model.config.model_type, ", ".join(own))
    return set(own)


def save_adapter(model: PeftModel, folder: Path, state_dict: dict | None = None) -> None:
    """Write the trained adapter, its config and its lineage; no weights of the base.

    Args:
        state_dict: of the whole model, where it had to be gathered from several devices.
    """
    # plain peft looks for the base from wherever it is run
    root = os.path.abspath(model.lineage.root) if model.lineage.local_root else model.lineage.root
    model.peft_config[POLICY].base_model_name_or_path = root
    with whole_files(folder) as new:
        if has_start(model):
            save_with_start(model, new)
        else:
            model.save_pretrained(
                str(new),
                state_dict=state_dict,
                selected_adapters=[POLICY],
                # "auto" would copy the whole head into the file when the head has an adapter
                save_embedding_layers=False,
            )
        (new / "README.md").write_text(_card(model.lineage), "utf-8")
    model.lineage.write(folder)


def describe_size(model: nn.Module, folder: Path) -> str:
    """Trainable share and file size, as measured."""
    # ds_numel: weights that DeepSpeed has split over the processes
    sizes = {n: (getattr(p, "ds_numel", count(p)), p) for n, p in model.named_parameters()}
    if not isinstance(model, PeftModel):
        return f"{sum(size for size, _ in sizes.values()):,} trained parameters, all of them"
    trained = sum(size for size, p in sizes.values() if p.requires_grad)
    frozen = sum(size for n, (size, p) in sizes.items() if not p.requires_grad and "lora_" not in n)
    megabytes = (folder / ADAPTER_WEIGHTS).stat().st_size / 1e6
    return (
        f"{trained:,} trained parameters beside {frozen:,} frozen ones "
        f"({trained / frozen:.2%}), {megabytes:.1f} MB on disk"
    )


def _continue(model: PeftModel, lineage: Lineage, *, merge: bool) -> PeftModel:
    """Train the last link further; the links before it are merged or stay frozen beside it."""
    last = lineage.links[-1]
    before = [f"link{n}" for n in range(len(lineage.links) - 1)]
    model.delete_adapter(f"link{len(before)}")
    if before and merge:
        model.base_model.set_adapter(before)
        model = merge_adapters(model)
    if before and not merge:
        model.load_adapter(str(last.path), POLICY, is_trainable=True)
    else:
        base = model if merge and before else without_adapters(model)
        model = PeftModel.from_pretrained(
            base, str(last.path), adapter_name=POLICY, is_trainable=True
        )
    _activate_policy(model)
    freeze_reference(model)
    return model


def _activate_policy(model: PeftModel) -> None:
    """Switch on all adapters; only the policy's learns. It comes first: peft saves the first."""
    links = [name for name in model.peft_config if name.startswith("link")]
    model.base_model.set_adapter([POLICY, *links])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and f".{POLICY}." in name)


def _card(lineage: Lineage) -> str:
    below = f"`{lineage.root}`" + "".join(f" + `{link.path}`" for link in lineage.links)
    return (
        f"# LoRA adapter\n\nThis adapter belongs on {below}, in that order; `lineage.json` has the "
        "hashes. On anything else it is another model.\n\n"
        "`unlora export` writes it as one standalone adapter on the root model, or merged.\n"
    )
