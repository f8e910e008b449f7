"""Put LoRA on a root model, with the adapters that its lineage already has."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from unlora.config.resolve import model_section
from unlora.errors import InputError
from unlora.model.adapter import ADAPTER_WEIGHTS, adapter_settings
from unlora.model.adapter_init import STARTS, has_start, load_with_start, save_with_start, start_at
from unlora.model.attach import SEVERAL_ON_PARAMETERS, load_model, load_weights, put_on
from unlora.model.lineage import Lineage
from unlora.model.merge import merge_adapters, share_left_by_rounding, without_adapters
from unlora.model.probe import Probe
from unlora.model.quantised import check_training, count
from unlora.model.reference import POLICY, freeze_reference, is_of
from unlora.model.resolved import ResolvedModel
from unlora.model.targets import checked_lora_config, patterns_are_checked, tell_of_full_rank
from unlora.runs.atomic_files import whole_files

ENOUGH = 0.95  # share of what adapters add to coarse weights with which they are merged
logger = logging.getLogger(__name__)


def refuse_unlike(lineage: Lineage, config: LoraConfig) -> None:
    """Raises InputError where a new adapter could not be put beside those of a lineage again."""
    if config.use_dora and lineage.links:
        raise InputError(
            "model.lora_config.use_dora is true, but the model has adapters already. DoRA scales "
            "the weights that it is trained on, and merged ones are not kept. Leave it out, or "
            "write the model into full weights first: unlora export --merged."
        )
    mine = set(config.target_parameters or ())
    for link in lineage.links if mine else ():
        before = set(adapter_settings(link.path).get("target_parameters") or ())
        if (before and before != mine) or not SEVERAL_ON_PARAMETERS:
            raise InputError(
                f"The new adapter is on the parameters {sorted(mine)}, and {str(link.path)!r} on "
                f"{sorted(before)}. peft puts several adapters on parameters from version 0.20 on, "
                "and only on the same ones. Set model.lora_config.target_parameters to those, or "
                "write the model into full weights first: unlora export --merged."
            )


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
        base: str | None = None,
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
                ``auto``: merge, or stack where the weights are quantised or so coarse that a merge
                would round away some of what the adapters do.
            base: the model that an adapter belongs on, where the one it names is not there.
            model_args: keyword arguments of ``AutoModelForCausalLM.from_pretrained``.

        Raises:
            InputError: no such model, a link is missing or changed, or the adapter does not fit.
        """
        section = {
            "model_args": {"pretrained_model_name_or_path": path_or_repo, **model_args},
            "use_lora": True,
            "lora_config": lora_config,
            "lineage": lineage,
            "base": base,
        }
        return load_with_adapter(ResolvedModel(model_section(section)))


def load_with_adapter(resolved: ResolvedModel) -> PeftModel:
    """Load a root model with an adapter to train; see :class:`LoRAModelForCausalLM`.

    Raises:
        InputError: no such model, a link is missing or changed, or the adapter does not fit.
    """
    mode, origin, quantised = resolved.section.lineage, resolved.lineage, resolved.quantised
    settings = dict(resolved.section.lora_config)
    start = STARTS.get(str(settings.get("init_lora_weights")))
    if start is not None:
        settings["init_lora_weights"] = True
    check_training(quantised, resolved.section, merges=bool(origin.links))
    config = checked_lora_config(settings, resolved.architecture, trust=resolved.trusts_code)
    if mode == "continue":
        _check_continues(resolved)
    else:
        refuse_unlike(origin, config)
    model, origin = load_model(origin, resolved.load_kwargs)
    if mode == "auto":
        mode = "stack" if quantised or _rounds_away(model) else "merge"
    target = Probe.of(model)
    if mode == "continue":
        model = _continue(model, origin, merge=not quantised)
        origin = Lineage(origin.root, origin.links[:-1], origin.fingerprint)
    else:
        with patterns_are_checked():
            if mode == "stack" and origin.links:
                model.add_adapter(POLICY, config)
                _activate_policy(model)
            else:
                model = get_peft_model(merge_adapters(model), config)
        if start is not None:
            start_at(model, start)
        tell_of_full_rank(model, POLICY)
    model.lineage, model.target = origin, target
    return model


def _check_continues(resolved: ResolvedModel) -> None:
    """Raises InputError where there is no adapter to train further, or a new one is asked for."""
    if not resolved.lineage.links:
        path = resolved.section.model_args["pretrained_model_name_or_path"]
        raise InputError(
            f"model.lineage is 'continue', but {path!r} has no adapter to "
            "continue. Give a run folder with an adapter, or leave model.lineage out."
        )
    start_name = str(resolved.section.lora_config.get("init_lora_weights"))
    if start_name in STARTS:
        raise InputError(
            "model.lineage is 'continue', which trains an adapter further, but "
            f"lora_config.init_lora_weights is {start_name}, which starts a new one. Leave "
            "out one of the two."
        )
    logger.info("the adapter is continued with its own settings, not model.lora_config")


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


def restore_adapter(model: PeftModel, folder: Path) -> None:
    """Put back what :func:`save_adapter` wrote, bit by bit.

    Raises:
        InputError: it is of another adapter.
    """
    if has_start(model):
        load_with_start(model, folder)
    else:
        load_weights(model, folder, POLICY)


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


def _rounds_away(model: nn.Module) -> bool:
    """Whether merging would round away some of what the adapters do; the log says so."""
    if not isinstance(model, PeftModel) or model.dtype not in (torch.bfloat16, torch.float16):
        return False
    share = share_left_by_rounding(model)
    if share >= ENOUGH:
        return False
    logger.info(
        "the earlier adapters stay beside the new one: of what they add to the %s weights, a merge "
        "would leave %.0f %% (model.lineage=merge merges all the same)",
        str(model.dtype).removeprefix("torch."), 100 * share,
    )  # fmt: skip
    return True


def _continue(model: PeftModel, lineage: Lineage, *, merge: bool) -> PeftModel:
    """Train the last link further; the links before it are merged or stay frozen beside it."""
    last = lineage.links[-1]
    before = [f"link{n}" for n in range(len(lineage.links) - 1)]
    model.delete_adapter(f"link{len(before)}")
    plain: Any = model
    if before and merge:
        model.base_model.set_adapter(before)
        plain = merge_adapters(model)
    elif not before:
        plain = without_adapters(model)
    model = put_on(plain, last.path, POLICY, trainable=True)
    _activate_policy(model)
    freeze_reference(model)
    return model


def _activate_policy(model: PeftModel) -> None:
    """Switch on all adapters, in the order of the lineage; only the policy's learns."""
    links = [name for name in model.peft_config if name.startswith("link")]
    model.base_model.set_adapter([*links, POLICY])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_of(POLICY, name))


def _card(lineage: Lineage) -> str:
    below = f"`{lineage.root}`" + "".join(f" + `{link.path}`" for link in lineage.links)
    return (
        f"# LoRA adapter\n\nThis adapter belongs on {below}, in that order; `lineage.json` has the "
        "hashes. On anything else it is another model.\n\n"
        "`unlora export` writes it as one standalone adapter on the root model, or merged.\n"
    )
