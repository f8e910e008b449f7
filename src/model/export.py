"""Write the model of a run folder as something that stands alone.

* ``merged``: full weights, for plain transformers;
* ``adapter``: one adapter on the root model, for plain peft. It is exact: the A of all links are
  stacked, and so are the B with their scaling, so the sum of the products is one product.
"""

import logging
import os
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from unlora.errors import InputError
from unlora.model.guards import Probe, export_parity
from unlora.model.lineage import Lineage
from unlora.model.load import attach, load_root, merge_adapters, without_adapters
from unlora.model.tokenizer import get_tokenizer

CARD = """# LoRA adapter

One adapter that stands for a whole lineage, to be loaded by peft on `{root}`.

Use it unmerged. Where the head of the root model shares its weights with the input embedding,
peft's own merge changes both; `unlora export --merged` writes correct full weights.
"""
logger = logging.getLogger(__name__)


def export(run: str, form: str, output: str | None = None) -> Path:
    """Write the model of ``run``; its answers are compared before it is called done.

    Args:
        run: a run folder with an adapter.
        form: ``merged`` or ``adapter``.
        output: a folder that does not exist yet; ``RUN/exported/<form>`` if not given.

    Raises:
        InputError: nothing to export, or the target exists.
        GuardError: what was written answers differently.
    """
    if not Path(run).is_dir():
        raise InputError(f"There is no run folder {run!r}.")
    lineage = Lineage.read(run)
    if not lineage.links:
        raise InputError(f"{run!r} has no adapter to export; it is a full model already.")
    folder = Path(output) if output else Path(run) / "exported" / form
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{str(folder)!r} is not empty. Give another --output, or remove it.")
    model = attach(load_root(lineage, {"dtype": "auto"})[0], lineage)
    said = Probe.take(model)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        forms = _write_merged if form == "merged" else _write_adapter
        finding = export_parity(said, **forms(model, lineage, temporary))
        tokenizer = get_tokenizer(run, {"pretrained_model_name_or_path": run})
        tokenizer.save_pretrained(str(temporary))
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info("guard: export parity: %s", finding)
    return folder


def _write_merged(model: PeftModel, lineage: Lineage, folder: Path) -> dict[str, torch.nn.Module]:
    merged = merge_adapters(model)
    merged.save_pretrained(str(folder))
    reloaded = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype="auto", trust_remote_code=False, use_safetensors=True
    )
    return {"merged": merged, "merged_and_reloaded": reloaded}


def _write_adapter(model: PeftModel, lineage: Lineage, folder: Path) -> dict[str, torch.nn.Module]:
    config, tensors = concatenated(model)
    base = without_adapters(model)
    joined = get_peft_model(base, config)
    state = dict(joined.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
    root = os.path.abspath(lineage.root) if lineage.local_root else lineage.root
    joined.peft_config["default"].base_model_name_or_path = root
    joined.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").write_text(CARD.format(root=root), "utf-8")
    reloaded = PeftModel.from_pretrained(load_root(lineage, {"dtype": "auto"})[0], str(folder))
    return {"joined_adapter": joined, "joined_adapter_reloaded": reloaded}


def concatenated(model: PeftModel) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """One LoRA that equals all adapters of the model together.

    Returns:
        Its config, and parameter name in a fresh peft model of that config -> value.

    Raises:
        InputError: an adapter is not plain LoRA (DoRA has no such sum).
    """
    names = list(model.active_adapters)
    layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    ranks = {name: model.peft_config[name].r for name in names}
    rank = 0
    for name in names:
        config = model.peft_config[name]
        if config.use_dora or config.peft_type != "LORA":
            raise InputError(
                f"Adapter {name} is not plain LoRA, so it cannot be joined with others. "
                "Export with --merged."
            )
        ranks[name] = max(layer.r[name] for layer in layers.values() if name in layer.r)
        rank += ranks[name]
    tensors = {}
    for place, layer in layers.items():
        a, b = [], []
        for name in (n for n in names if n in layer.r):
            a.append(layer.lora_A[name].weight)
            b.append(layer.lora_B[name].weight * layer.scaling[name])
        missing = rank - sum(x.shape[0] for x in a)
        a.append(a[0].new_zeros(missing, a[0].shape[1]))
        b.append(b[0].new_zeros(b[0].shape[0], missing))
        prefix = f"base_model.model.{place}"
        tensors[f"{prefix}.lora_A.default.weight"] = torch.cat(a, 0).detach().clone()
        tensors[f"{prefix}.lora_B.default.weight"] = torch.cat(b, 1).detach().clone()
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=sorted(layers), bias="none", task_type="CAUSAL_LM"
    )
    return config, tensors
