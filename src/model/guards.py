"""The four guards: what must hold in every run, checked in every run.

Each has silently falsified published LoRA unlearning: training that started from the wrong model,
adapters without gradients, an evaluation that changed the model, a merge that changed the answers.
"""

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unlora.errors import GuardError, InputError

# largest difference between logits that rounding explains, relative to their largest size
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


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
        """Ask the model about token sequences that are the same for every model of its size."""
        vocabulary = model.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        input_ids = torch.randint(vocabulary, (rows, length), generator=generator)
        logits = answers(model, input_ids)
        if not logits.isfinite().all():
            raise InputError(
                "The model answers with NaN or infinity before anything is trained. Its weights "
                "are damaged, or its dtype is too small for it: set "
                "model.model_args.torch_dtype=float32 or bfloat16, or copy the weights again."
            )
        return cls(input_ids, logits)

    def beside(self, other: nn.Module) -> "Probe":
        """The same, with what ``other`` says: the model that must not be taken for this one."""
        return replace(self, without=answers(other, self.input_ids))

    def difference(self, model: nn.Module) -> tuple[float, float]:
        """Largest difference between the logits then and now, absolute and relative."""
        now = answers(model, self.input_ids)
        difference = (now - self.logits).abs().max().item()
        return difference, difference / max(self.logits.abs().max().item(), 1e-9)


@dataclass(frozen=True)
class Start:
    """What *start equals target* saw.

    Attributes:
        difference: the largest between the logits of the model and those of its target.
    """

    words: str
    difference: float


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
        return forward(input_ids=input_ids.to(device), use_cache=False).logits.float().cpu()
    finally:
        for module, training in modes.items():
            module.training = training


def start_equals_target(model: nn.Module, target: Probe) -> Start:
    """Before step 1: the model answers as the model that its lineage names.

    Raises:
        GuardError: it does not.
    """
    difference, relative = target.difference(model)
    allowed = tolerance(model)
    finding = (
        f"logits on {len(target.input_ids)} probe rows differ from the target's by "
        f"{difference:.2e} ({relative:.1e} of their size, {allowed:.0e} allowed)"
    )
    if not relative <= allowed or _nearer_to_the_root(model, target):
        raise GuardError(
            f"start equals target: {finding}. Training would start from another model."
        )
    return Start(finding, difference)


def _nearer_to_the_root(model: nn.Module, target: Probe) -> bool:
    """Whether the model answers rather as if the adapters of its lineage were not there.

    A tolerance that is wide enough for bfloat16 is wider than what a short fine-tuning changes.
    """
    if target.without is None:
        return False
    now = answers(model, target.input_ids)
    to_target, to_root = ((now - said).norm() for said in (target.logits, target.without))
    return bool(to_target > to_root)


def tolerance(model: nn.Module) -> float:
    """The largest difference that rounding explains: that of the coarsest weights."""
    if getattr(model, "is_quantized", False):
        return 0.1
    found = {p.dtype for p in model.parameters()} & TOLERANCE.keys()
    return max((TOLERANCE[dtype] for dtype in found), default=TOLERANCE[torch.float32])


def gradient_faults(model: nn.Module, resting: frozenset[str] = frozenset()) -> list[str]:
    """After a backward pass: trainable tensors without a finite gradient, and dead lora_B.

    A lora_A has zero gradient while its lora_B is zero, so only lora_B must be different from zero.

    Args:
        resting: names of tensors that the objective does not reach.
    """
    faults = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or name in resting:
            continue
        if parameter.grad is None:
            faults.append(f"{name}: no gradient")
        elif not parameter.grad.isfinite().all():
            faults.append(f"{name}: gradient not finite")
        elif "lora_B" in name and not parameter.grad.any():
            faults.append(f"{name}: gradient is zero")
    return faults


def lora_b(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every trainable lora_B, to see later which of them have moved."""
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "lora_B" in name
    }
    with _whole(found.values()):
        return {name: parameter.detach().clone() for name, parameter in found.items()}


def unmoved(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    """The lora_B that are still what they were."""
    now = dict(model.named_parameters())
    with _whole(now[name] for name in before):
        return [name for name, old in before.items() if torch.equal(now[name].detach(), old)]


@contextmanager
def _whole(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Weights that DeepSpeed has split over the processes are whole within."""
    split = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not split:
        yield
        return
    # it is there where it has split them, and is no package that this one declares
    with sys.modules["deepspeed"].zero.GatheredParameters(split):
        yield


def gradients_alive(faults: list[str], unmoved: list[str]) -> str:
    """After the first step: every trainable tensor had a finite gradient, every lora_B moved.

    Raises:
        GuardError: one of them did not; the message names the first few.
    """
    found = faults + [f"{name}: did not move" for name in unmoved]
    if found:
        raise GuardError(
            f"gradients alive: {len(found)} trainable tensors do not learn, among them "
            f"{'; '.join(found[:4])}. With gradient checkpointing the inputs must require "
            "gradients; a frozen or merged adapter cannot learn."
        )
    return "every trainable tensor had a finite gradient and every lora_B moved"


@contextmanager
def evaluation_is_pure(model: nn.Module) -> Iterator[None]:
    """Weights, requires_grad, train/eval modes and random state are the same after as before.

    Raises:
        GuardError: on leaving, if something changed; the message names it.
    """
    before = _state(model)
    yield
    after = _state(model)
    changed = [what for what in before if before[what] != after[what]]
    if changed:
        raise GuardError(
            f"evaluation is pure: the evaluation changed {', '.join(changed)} of the model. "
            "Training after it would be silently wrong."
        )


def _state(model: nn.Module) -> dict[str, object]:
    for module in model.modules():
        if hasattr(module, "reshard"):  # FSDP: a pass leaves some weights gathered
            module.reshard()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    drawn: Any = np.random.get_state(legacy=False)
    return {
        "the weights": {name: _checksum(tensor) for name, tensor in tensors.items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "train/eval mode": {name: module.training for name, module in model.named_modules()},
        "the random state": (
            random.getstate(),
            str(drawn["state"]["pos"]),
            drawn["state"]["key"].tobytes(),
            bytes(torch.get_rng_state().numpy()),
            [bytes(s.numpy()) for s in torch.cuda.get_rng_state_all()]
            if torch.cuda.is_available()
            else [],
        ),
    }


def _checksum(tensor: Tensor) -> tuple[object, ...]:
    """Changes with any single element; reads every bit once and copies nothing."""
    tensor = getattr(tensor, "ds_tensor", tensor)  # this process's part, where DeepSpeed splits
    if tensor.is_meta or tensor.numel() == 0:
        return (tensor.shape, tensor.dtype)
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().contiguous().view(integer[tensor.element_size()])
    return (tensor.shape, tensor.dtype, bits.sum(dtype=torch.int64).item())


def export_parity(reference: Probe, **exported: nn.Module) -> str:
    """Logits of the adapter model and of each exported form of it agree.

    Args:
        exported: form ("merged", "merged and reloaded") -> model.

    Raises:
        GuardError: one of them answers differently.
    """
    findings = []
    for form, model in exported.items():
        difference, relative = reference.difference(model)
        allowed = tolerance(model)
        findings.append(f"{form.replace('_', ' ')} {difference:.2e}")
        if not relative <= allowed:
            raise GuardError(
                f"export parity: logits of the {form.replace('_', ' ')} model differ from the "
                f"adapter's by {difference:.2e} ({relative:.1e} of their size, {allowed:.0e} "
                "allowed). Nothing usable was written."
            )
    return f"largest difference of logits: {', '.join(findings)}"
