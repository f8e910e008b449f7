"""Export the model of a run folder, or a foreign adapter, as a standalone model or adapter.

* ``merged``: full weights, for plain transformers;
* ``adapter``: one adapter on the root model, for plain peft. A lineage of one adapter is that one;
  of several, the A of all are stacked, and so are the B with their scaling, so that the sum of the
  products is one product. Of that, the largest singular values are left, as few as answer alike.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from unlora.errors import InputError
from unlora.model.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_settings, stored_names
from unlora.model.attach import load_model
from unlora.model.guards import export_parity
from unlora.model.lineage import Lineage
from unlora.model.load import DTYPES, load_root
from unlora.model.low_rank import LowRank, smallest_rank
from unlora.model.merge import merge_adapters
from unlora.model.probe import Probe
from unlora.model.targets import patterns_are_checked
from unlora.model.tokenizer import get_tokenizer
from unlora.registry import unknown
from unlora.runs.atomic_files import whole_folder, write_json
from unlora.runs.run import refuse_filled

MERGED = """# Merged model

`{root}` with the adapters {links} merged into its weights, as {dtype}. {finding}.{head}
"""
OWN_HEAD = """

The head has weights of its own here (`tie_word_embeddings` is false): in `{root}` it shares those
of the input embedding, and an adapter was on one of the two."""
ADAPTER = """# LoRA adapter

One adapter that stands for a whole lineage, to be loaded by peft on `{root}`. {finding}.{head}
"""
TIED_HEAD = """

It is also on the output head, which in `{root}` shares its weights with the input embedding. Load
it with `PeftModel.from_pretrained` and leave it unmerged: peft's merge changes the embedding, too.
`lm_eval --model hf --model_args pretrained=...,peft=...` ends in a KeyError (it ties the weights
once more), and llama.cpp refuses it or leaves the head out without a word (a tied model has no
`output.weight`). For them, and wherever an adapter on a head is not read, write full weights:
`unlora export ... --merged`. An adapter that all of them read is one that was trained without
`lm_head` among `model.lora_config.target_modules`.
"""
TOLD = (
    "the adapter is on a head that shares its weights with the input embedding; lm_eval's peft= "
    "and llama.cpp do not read such an adapter (see its README.md): for them, export with --merged"
)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
logger = logging.getLogger(__name__)


@contextmanager
def export_folder(folder: Path) -> Iterator[Path]:
    """Where an export is written; on leaving it takes the place of ``folder``, whole.

    Raises:
        InputError: there is something in the folder, or it cannot be written.
    """
    refuse_filled(folder)
    try:
        with whole_folder(folder) as temporary:
            yield temporary
    except OSError as error:
        raise InputError(
            f"{str(folder)!r} cannot be written: {error.strerror or error}. Give --output FOLDER."
        ) from error


def export(
    run: str,
    form: str,
    output: str | None = None,
    *,
    dtype: str = "auto",
    base: str | None = None,
) -> Path:
    """Write the model of ``run``; its answers are compared before it is called done.

    Args:
        run: a run folder with an adapter, or an adapter.
        form: ``merged`` or ``adapter``.
        output: a folder that does not exist yet; ``RUN/exported/<form>`` if not given.
        dtype: of merged weights; ``auto`` is that of the root model.
        base: the model that an adapter is on, where the one it names is not there.

    Raises:
        InputError: nothing to export, or the target exists or cannot be written.
        GuardError: what was written answers differently.
    """
    if not Path(run).is_dir():
        raise InputError(f"There is no run folder {run!r}.")
    if dtype not in DTYPES:
        raise InputError(unknown("dtype", dtype, DTYPES))
    if dtype != "auto" and form != "merged":
        raise InputError("--dtype is of merged weights; an adapter stays as it was trained.")
    lineage = Lineage.read(run, base, merging=form == "merged")
    if not lineage.links:
        raise InputError(f"{run!r} has no adapter to export; it is a full model already.")
    folder = Path(output) if output else Path(run) / "exported" / form
    with export_folder(folder) as temporary:
        model, lineage = load_model(lineage, {"dtype": "auto"}, merging=form == "merged")
        if form == "merged":
            finding = _write_merged(model, lineage, temporary, dtype)
        else:
            finding = _write_adapter(model, lineage, temporary)
        home = tokenizer_home(run, lineage)
        get_tokenizer(home, {"pretrained_model_name_or_path": home}).save_pretrained(str(temporary))
    logger.info("guard: export parity: %s", finding)
    if "is left" in finding and dtype == "auto":
        logger.info("--dtype float32 keeps all that the adapters do")
    return folder


def tokenizer_home(run: str, lineage: Lineage) -> str:
    """The folder or repository that has the tokenizer of a run."""
    places = [Path(run), *reversed(lineage.folders)]
    with_one = (p for p in places if any((p / file).is_file() for file in TOKENIZER))
    return str(next(with_one, lineage.root))


def _write_merged(model: Any, lineage: Lineage, folder: Path, dtype: str) -> str:
    probe, root, tied = Probe.of(model), root_name(lineage), model.config.tie_word_embeddings
    if dtype != "auto":
        model = model.float()  # merged in float32, and rounded once
    merged = merge_adapters(model)
    if dtype != "auto":
        merged = merged.to(DTYPES[dtype])
    merged.save_pretrained(str(folder))
    reloaded = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype="auto", trust_remote_code=False, use_safetensors=True
    )
    finding = export_parity(probe, merged=merged, merged_and_reloaded=reloaded)
    own_head = tied and not merged.config.tie_word_embeddings
    card = MERGED.format(
        root=root,
        links=", ".join(f"`{link.path}`" for link in lineage.links),
        dtype=str(merged.dtype).removeprefix("torch."),
        finding=finding[0].upper() + finding[1:],
        head=OWN_HEAD.format(root=root) if own_head else "",
    )
    (folder / "README.md").write_text(card, "utf-8")
    return finding


def _write_adapter(model: PeftModel, lineage: Lineage, folder: Path) -> str:
    probe, root, ranks = Probe.of(model), root_name(lineage), ""
    head = isinstance(model.get_output_embeddings(), LoraLayer) and model.config.tie_word_embeddings
    base = load_root(lineage, {"dtype": "auto"})[0]
    if len(lineage.links) == 1:
        _copy(lineage.links[0].path, root, folder)
    else:
        config, tensors = concatenated(model)
        base, joined = smallest_rank(base, probe, config, tensors)
        ranks = f"; the joined adapters of rank {config.r} are one of rank {joined.config.r}"
        write_adapter(joined, root, folder)
    with patterns_are_checked():
        reloaded = PeftModel.from_pretrained(base, str(folder))
    finding = export_parity(probe, adapter_reloaded=reloaded) + ranks
    card = ADAPTER.format(
        root=root,
        finding=finding[0].upper() + finding[1:],
        head=TIED_HEAD.format(root=root) if head else "",
    )
    (folder / "README.md").write_text(card, "utf-8")
    if head:
        logger.warning(TOLD)
    return finding


def write_adapter(adapter: LowRank, root: str, folder: Path) -> None:
    """An adapter on ``root`` as plain peft reads it."""
    adapter.config.base_model_name_or_path = root
    adapter.config.inference_mode = True
    adapter.config.save_pretrained(str(folder))
    save_file(adapter.tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def root_name(lineage: Lineage) -> str:
    """The root model as an export names it: a repository, or the absolute path of a folder."""
    return os.path.abspath(lineage.root) if lineage.local_root else lineage.root


def _copy(link: Path, root: str, folder: Path) -> None:
    """One adapter as plain peft reads it, on the root model as it is now."""
    settings = adapter_settings(link) | {"base_model_name_or_path": root, "inference_mode": True}
    write_json(folder / ADAPTER_CONFIG, settings)
    content = load_file(link / ADAPTER_WEIGHTS)
    tensors = {name: content[stored] for name, stored in stored_names(link).items()}
    lora = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    save_file(lora, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def concatenated(model: PeftModel) -> tuple[LoraConfig, dict[str, Tensor]]:
    """One LoRA that equals all adapters of the model together.

    Returns:
        Its config, and name in its file -> value.

    Raises:
        InputError: an adapter is not plain LoRA (DoRA has no such sum).
    """
    names = list(model.active_adapters)
    for name in names:
        if model.peft_config[name].use_dora:
            raise InputError(
                f"Adapter {name} is not plain LoRA, so it cannot be joined with others. "
                "Export with --merged."
            )
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    # every layer has the adapters that are on it; the others count as zeros
    rank = sum(max(m.r[name] for m in layers.values() if name in m.r) for name in names)
    tensors = {}
    for path, layer in layers.items():
        experts = getattr(layer, "num_experts", 1)
        parts = [_factors(layer, name, experts) for name in names if name in layer.r]
        missing = rank - sum(a.shape[1] for a, _ in parts)
        first_a, first_b = parts[0]
        parts.append(
            (
                first_a.new_zeros(experts, missing, first_a.shape[2]),
                first_b.new_zeros(first_b.shape[0], missing, experts),
            )
        )
        a = torch.cat([a for a, _ in parts], 1).flatten(0, 1)
        b = torch.cat([b for _, b in parts], 1).flatten(1)
        kind, ending = ("embedding_", "") if layer.lora_embedding_A else ("", ".weight")
        for side, tensor in (("A", a), ("B", b)):
            name = f"base_model.model.{path}.lora_{kind}{side}{ending}"
            tensors[name] = tensor.detach().cpu().contiguous()
    parameters = {
        f"{path.replace('.base_layer', '')}.{layer.parameter_name}"
        for path, layer in layers.items()
        if hasattr(layer, "parameter_name")
    }
    modules = [path for path, layer in layers.items() if not hasattr(layer, "parameter_name")]
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(modules),
        bias="none",
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in layers.values()),
        **({"target_parameters": sorted(parameters)} if parameters else {}),
    )
    return config, tensors


def _factors(layer: LoraLayer, name: str, experts: int) -> tuple[Tensor, Tensor]:
    """[experts, rank, in] and [out, rank, experts], with the scaling in the second."""
    if layer.lora_embedding_A:
        a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    else:
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    scaled = b.float() * layer.scaling[name]
    return a.float().reshape(experts, -1, a.shape[1]), scaled.reshape(len(b), -1, experts)
