"""Check in every run what must hold: the five guards.

Each has silently falsified published LoRA unlearning: training that started from the wrong model,
adapters without gradients, an evaluation that changed the model, an adapter that is another when
it is read again, a merge that changed the answers.
"""

import random
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from unlora.errors import GuardError
from unlora.model.attach import SEVERAL_ON_PARAMETERS, put_on
from unlora.model.probe import (
    LEAST_SHARE,
    ROUNDING_OF,
    Comparison,
    Probe,
    _split,
    asked_in_float32,
    tolerance,
)
from unlora.model.reference import POLICY, switched

SAVED = "saved"
USELESS = ". Nothing usable was written."

EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Start:
    """What *start equals target* saw.

    Attributes:
        difference: the largest between the logits of the model and those of its target.
    """

    words: str
    difference: float


def start_equals_target(model: nn.Module, target: Probe) -> Start:
    """Before step 1: the model answers as the model that its lineage names.

    Raises:
        GuardError: it does not.
    """
    seen, allowed = target.compared(model), tolerance(model)
    finding = (
        f"logits on {len(target.input_ids)} probe rows differ from the target's by "
        f"{seen.difference:.2e} ({seen.relative:.1e} of their size, {allowed:.0e} allowed)"
    )
    if seen.same(allowed):
        return Start(finding, seen.difference)
    if seen.share is not None and asked_in_float32(model):
        finding = (
            f"merged and rounded, {seen.share:.0%} of what the adapters do to the probe rows is "
            f"left ({LEAST_SHARE:.0%} wanted), and logits differ by {seen.difference:.2e}"
        )
    if not seen.kept():
        advice = (
            " Set model.model_args.torch_dtype=float32 or model.lineage=stack."
            if seen.share is not None
            else ""
        )
        raise GuardError(
            f"start equals target: {finding}. Training would start from another model.{advice}"
        )
    return Start(finding, seen.difference)


def saved_equals_trained(model: PeftModel, folder: Path) -> str:
    """After training: what was saved, read back beside the trained adapter, answers as it does.

    Raises:
        GuardError: it does not.
    """
    on_parameters = getattr(model.peft_config[POLICY], "target_parameters", None)
    if _split(model) or (on_parameters and not SEVERAL_ON_PARAMETERS):
        return "not checked: it cannot be read back beside the trained one here"
    below = [name for name in model.active_adapters if name.startswith("link")]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    trained = Probe.take(model)
    with torch.random.fork_rng():
        put_on(model, folder, SAVED)
    with switched(model, [*below, SAVED]):
        difference, relative = trained.difference(model)
    model.delete_adapter(SAVED)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
    finding = f"logits of the saved adapter differ from the trained one's by {difference:.2e}"
    if not relative <= tolerance(model):
        raise GuardError(
            f"saved equals trained: {finding}. The folder {str(folder)!r} holds another model than "
            "the one that was trained."
        )
    return finding


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
        if EXPERT.search(name) and (parameter.grad is None or not parameter.grad.any()):
            continue  # no token of this step was sent to it
        if parameter.grad is None:
            faults.append(f"{name}: no gradient")
        elif not parameter.grad.isfinite().all():
            faults.append(f"{name}: gradient not finite")
        elif "lora_B" in name and not parameter.grad.any():
            faults.append(f"{name}: gradient is zero")
    return faults


def lora_b(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every trainable lora_B, to see later which of them have moved."""
    weights = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "lora_B" in name
    }
    with _whole(weights.values()):
        return {name: parameter.detach().clone() for name, parameter in weights.items()}


def unmoved(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    """The lora_B that are still what they were."""
    now = dict(model.named_parameters())
    with _whole(now[name] for name in before):
        same = [name for name, old in before.items() if torch.equal(now[name].detach(), old)]
        return [name for name in same if not EXPERT.search(name)]


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
    stuck = faults + [f"{name}: did not move" for name in unmoved]
    if stuck:
        raise GuardError(
            f"gradients alive: {len(stuck)} trainable tensors do not learn, among them "
            f"{'; '.join(stuck[:4])}. With gradient checkpointing the inputs must require "
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
    """Each exported form of a model with adapters answers as it does.

    Args:
        exported: form ("merged", "merged and reloaded") -> model.

    Raises:
        GuardError: one of them does not, or rounding takes away too much of what the adapters do.
    """
    findings = []
    for name, model in exported.items():
        form, seen, allowed = name.replace("_", " "), reference.compared(model), tolerance(model)
        finding = f"{form} {seen.difference:.2e}"
        if not seen.same(allowed):
            finding += f" ({seen.share or 0:.1%} of what the adapters do is left)"
            differ = (
                f"logits of the {form} model differ from the adapter's by {seen.difference:.2e} "
                f"({seen.relative:.1e} of their size, {allowed:.0e} allowed)"
            )
            if not seen.kept():
                rounded = seen.share is not None and seen.relative <= ROUNDING_OF.get(
                    model.dtype, 0
                )
                raise GuardError(f"export parity: {differ}{_lost(seen) if rounded else USELESS}")
        findings.append(finding)
    return f"largest difference of logits: {', '.join(findings)}"


def _lost(seen: Comparison) -> str:
    share = min(max(seen.share or 0, 0), 1)
    return (
        f": rounded to their dtype, the weights hold {share:.0%} of what the adapters do "
        f"({LEAST_SHARE:.0%} wanted). Nothing was written. Add --dtype float32, or export with "
        "--adapter, which rounds nothing."
    )
