"""Count parameters and bytes of a model and its adapters on torch's meta device."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from unlora.errors import InputError
from unlora.forward.architecture import output_embedding
from unlora.model import ResolvedModel
from unlora.model.adapter import ADAPTER_WEIGHTS, adapter_settings
from unlora.model.adapter_init import STARTS
from unlora.model.targets import checked_lora_config
from unlora.trainer.plugins import Plugins

HEADER = 180  # bytes that a safetensors file has for each tensor, about


@dataclass(frozen=True)
class _Size:
    """Parameters, how many and in how many bytes."""

    count: int
    bytes: int

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> "_Size":
        return cls(sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors))

    def __add__(self, other: "_Size") -> "_Size":
        return _Size(self.count + other.count, self.bytes + other.bytes)


@dataclass(frozen=True)
class MetaModel:
    """A model without memory, as it is trained.

    Attributes:
        base: the root model.
        model: with the adapter that is trained, where there is one.
        weights: bytes of the root model as it is loaded.
        frozen: the adapters that stay as they are beside it.
        copies: of the adapter in the file that is saved.
    """

    base: Any
    model: nn.Module
    weights: int
    frozen: _Size = _Size(0, 0)
    copies: int = 1

    @classmethod
    def of(cls, resolved: ResolvedModel, plugins: Plugins) -> "MetaModel":
        base, section = _skeleton(resolved), resolved.section
        if section.use_lora and _separates_head(base, resolved):
            head = output_embedding(base)
            head.weight = nn.Parameter(torch.empty_like(head.weight))
        weights = _weight_bytes(base, resolved.quantised)
        if not section.use_lora:
            return cls(base, base, weights)
        model, frozen = _adapted(base, resolved)
        # it starts at a part of the weights, beside a twin that takes that away
        if plugins.start is not None or section.lora_config.get("init_lora_weights") in STARTS:
            return cls(base, model, weights, frozen + _adapter(model), copies=2)
        return cls(base, model, weights, frozen)

    @property
    def adapter(self) -> _Size:
        return _adapter(self.model)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters()) + self.frozen.count

    @property
    def file(self) -> int:
        """Bytes on disk of what is saved."""
        if self.model is self.base:
            return self.weights + HEADER * sum(1 for _ in self.model.parameters())
        tensors = sum("lora_" in name for name, _ in self.model.named_parameters())
        return self.adapter.bytes * self.copies + HEADER * tensors


def _skeleton(resolved: ResolvedModel) -> Any:
    """The root model without memory, in the dtype that it would be loaded in."""
    args, architecture = resolved.load_kwargs, resolved.architecture
    dtype = args["dtype"]
    if dtype == "auto":
        dtype = getattr(architecture, "dtype", None) or torch.float32
    trust = {k: args[k] for k in ("trust_remote_code",) if k in args}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_config(architecture, dtype=dtype, **trust)


def _adapted(base: Any, resolved: ResolvedModel) -> tuple[PeftModel, _Size]:
    """The model with the adapter that is trained; and the frozen adapters beside it."""
    section, lineage = resolved.section, resolved.lineage
    if section.lineage == "continue":
        if not lineage.links:
            raise InputError(
                "model.lineage is 'continue', but there is no adapter to continue. Give a run "
                "folder with an adapter, or leave model.lineage out."
            )
        lora, earlier = LoraConfig.from_pretrained(str(lineage.links[-1].path)), lineage.links[:-1]
        lora.inference_mode = False
    else:
        # how it begins has no size
        settings = {**section.lora_config, "init_lora_weights": True}
        lora, earlier = checked_lora_config(settings, base.config), lineage.links
    lora.init_lora_weights = True
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, lora)
    frozen = _Size(0, 0)
    if section.lineage == "continue":
        frozen += _adapter(model)  # the twin that is the reference
    if resolved.quantised or section.lineage == "stack":
        for link in earlier:
            size = (link.path / ADAPTER_WEIGHTS).stat().st_size
            frozen += _Size(size // 4, size)
    return model, frozen


def _separates_head(base: Any, resolved: ResolvedModel) -> bool:
    """Whether an earlier adapter on a tied head is merged, after which it is tied no more."""
    section, lineage = resolved.section, resolved.lineage
    head = output_embedding(base)
    if head.weight is not base.get_input_embeddings().weight:
        return False
    merged = lineage.links[: -1 if section.lineage == "continue" else None]
    if resolved.quantised or section.lineage == "stack":
        return False
    name = next(n for n, module in base.named_modules() if module is head).rpartition(".")[2]
    return any(name in (adapter_settings(x.path).get("target_modules") or ()) for x in merged)


def _adapter(model: nn.Module) -> _Size:
    return _Size.of([p for name, p in model.named_parameters() if "lora_" in name])


def _weight_bytes(base: Any, quantised: Mapping[str, Any]) -> int:
    """Bytes of the weights; of quantised ones with the scales that belong to them.

    nf4 and fp4 have half a byte for each number, and an absmax for each 64, in float32, or with
    double quantisation in one byte and a float32 for each 256 of those. int8 has a float32 for each
    output. The head and what has one dimension stay as they are.
    """
    bits = 4 if quantised.get("load_in_4bit") else 8 if quantised.get("load_in_8bit") else 0
    bits = bits or int(quantised.get("bits") or 0)
    small: dict[int, float] = {}
    if bits:
        skipped = tuple(quantised.get("llm_int8_skip_modules") or ())
        head = output_embedding(base)
        for name, module in base.named_modules():
            linear = isinstance(module, (nn.Linear, Conv1D)) and module is not head
            if linear and not any(part in name for part in skipped):
                count, scales = module.weight.numel(), float(module.weight.shape[0] * 4)
                if bits == 4:
                    scales = count / 64 * 4
                    if quantised.get("bnb_4bit_use_double_quant"):
                        scales = count / 64 * (1 + 4 / 256)
                small[id(module.weight)] = count * bits / 8 + scales
    return math.ceil(sum(small.get(id(p), p.nbytes) for p in base.parameters()))
