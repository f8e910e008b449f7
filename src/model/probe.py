"""Compare what two models say about a few fixed token sequences, in float32 where that can be."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from unlora.errors import InputError
from unlora.forward.architecture import decoder_layers
from unlora.model.reference import adapters_off

# kinds of attention that compute in float32, too
FLOAT32_TOO = ("sdpa", "eager")


# largest difference between logits that rounding explains, relative to their largest size: of a
# model that is asked in float32, and of one that can only be asked in the dtype of its weights
ROUNDING = 1e-3


ROUNDING_OF = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


# adapters that do less than this to log-probabilities, relative to the largest, do nothing
UNSEEN = 1e-5


# share of what the adapters change that must be left where weights were rounded
LEAST_SHARE = 0.75


@dataclass(frozen=True)
class Probe:
    """What a model says about a few fixed token sequences.

    Attributes:
        without: what the same model says without its adapters, where it has any.
    """

    input_ids: Int[Tensor, "rows time"]
    logits: Float[Tensor, "rows time vocab"]
    without: Float[Tensor, "rows time vocab"] | None = None

    @classmethod
    def take(cls, model: nn.Module, *, rows: int = 4, length: int = 16) -> "Probe":
        """Ask the model about token sequences that are the same for every model of its size.

        The last row holds the last tokens of the vocabulary, where those stand that were added.
        """
        vocabulary = model.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        input_ids = torch.randint(vocabulary, (rows, length), generator=generator)
        last = torch.arange(vocabulary - min(length, vocabulary), vocabulary)
        input_ids = torch.cat([input_ids, last[-1] - torch.arange(length)[None] % len(last)])
        logits = answers(model, input_ids)
        if not logits.isfinite().all():
            raise InputError(
                f"The model {model.config.name_or_path!r} answers with NaN or infinity as it is "
                "loaded. Its weights are damaged, or its dtype is too small for it: set "
                "model.model_args.torch_dtype=float32 or bfloat16, or copy the weights again."
            )
        return cls(input_ids, logits)

    @classmethod
    def of(cls, model: nn.Module) -> "Probe":
        """The same, with what the model says without its adapters, where it has any."""
        probe = cls.take(model)
        if not isinstance(model, PeftModel):
            return probe
        with adapters_off(model):
            return replace(probe, without=answers(model, probe.input_ids))

    def difference(self, model: nn.Module) -> tuple[float, float]:
        """Largest difference between the logits then and now, absolute and relative."""
        return self._difference(answers(model, self.input_ids))

    def _difference(self, now: Float[Tensor, "rows time vocab"]) -> tuple[float, float]:
        difference = (now - self.logits).abs().max().item()
        return difference, difference / max(self.logits.abs().max().item(), 1e-9)

    def compared(self, model: nn.Module) -> "Comparison":
        """How a model that should be the same differs."""
        now = answers(model, self.input_ids)
        difference, relative = self._difference(now)
        if self.without is None:
            return Comparison(difference, relative, None, 0.0)
        root, wanted, left = (x.log_softmax(-1) for x in (self.without, self.logits, now))
        effect, remaining = wanted - root, left - root
        if effect.abs().max() <= UNSEEN * wanted.abs().max():
            return Comparison(difference, relative, None, 0.0)
        size = effect.square().sum().clamp_min(1e-30)
        share = ((remaining * effect).sum() / size).item()
        return Comparison(
            difference, relative, share, ((remaining - effect).norm() / size.sqrt()).item()
        )


@dataclass(frozen=True)
class Comparison:
    """A model beside the one that it should be.

    Attributes:
        difference: the largest between their logits.
        relative: the same, relative to the largest logit.
        share: of what the adapters do to the log-probabilities, how much is left; None where they
            do nothing.
        error: what differs of the log-probabilities, relative to what the adapters do to them.
    """

    difference: float
    relative: float
    share: float | None
    error: float

    def same(self, allowed: float) -> bool:
        """Whether they differ by no more than rounding explains."""
        # a change that is smaller than rounding must not be missed
        return self.relative <= allowed and self.error < 0.5

    def kept(self) -> bool:
        """Whether enough of what the adapters do is left where weights were rounded."""
        return self.share is not None and abs(self.share - 1) <= 1 - LEAST_SHARE and self.error < 1


@torch.no_grad()
def answers(
    model: nn.Module, input_ids: Int[Tensor, "rows time"]
) -> Float[Tensor, "rows time vocab"]:
    """Logits in eval mode, in float32 on the CPU; the model's modes are left as they were."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    device = model.get_input_embeddings().weight.device
    try:
        # accelerate wraps the forward pass in autocast; what is compared is the model itself
        forward = getattr(model, "_original_forward", model)
        with in_float32(model):
            return forward(input_ids=input_ids.to(device), use_cache=False).logits.float().cpu()
    finally:
        for module, training in modes.items():
            module.training = training


def asked_in_float32(model: nn.Module) -> bool:
    """Whether weights of fewer bits can be taken for float32 while a model is asked."""
    config = model.config
    if getattr(model, "is_quantized", False) or config._attn_implementation not in FLOAT32_TOO:
        return False
    return not _split(model)


def _split(model: nn.Module) -> bool:
    """Whether weights are elsewhere: with other processes, or held back by accelerate."""
    return any(
        hasattr(p, "ds_id") or hasattr(p, "full_tensor") or p.is_meta for p in model.parameters()
    )


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Compute in float32, a layer at a time: then models differ by their weights alone.

    A forward pass in bfloat16 rounds each state, and a deep one differs from itself by more than
    many adapters change.
    """
    if not asked_in_float32(model):
        yield
        return
    layers = list(decoder_layers(model))
    # an adapted head as a whole: peft casts what it is given to the dtype of the adapter in it
    layers += [module for module in model.modules() if isinstance(module, LoraLayer)]
    inside = {id(module) for layer in layers for module in layer.modules()}
    beside = [module for module in model.modules() if id(module) not in inside]
    stored: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}

    def widen(module: nn.Module, *_: Any) -> None:
        parameters = module.parameters(recurse=id(module) in inside)
        stored[id(module)] = [
            (p, p.data) for p in parameters if p.dtype in (torch.bfloat16, torch.float16)
        ]
        for parameter, data in stored[id(module)]:
            parameter.data = data.float()

    def put_back(module: nn.Module, *_: Any) -> None:
        for parameter, data in stored.pop(id(module), ()):
            parameter.data = data

    handles = []
    for module in (*layers, *beside):
        handles.append(module.register_forward_pre_hook(widen))
        handles.append(module.register_forward_hook(put_back, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tolerance(model: nn.Module) -> float:
    """The largest difference that rounding explains, relative to the largest logit."""
    if asked_in_float32(model):
        return ROUNDING
    if getattr(model, "is_quantized", False):
        return 0.1
    dtypes = {p.dtype for p in model.parameters()} & ROUNDING_OF.keys()
    return max((ROUNDING_OF[dtype] for dtype in dtypes), default=ROUNDING)
