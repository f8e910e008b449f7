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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from unlora.errors import GuardError, InputError
from unlora.forward.outputs import decoder_layers
from unlora.model.attach import SEVERAL_ON_PARAMETERS, put_on
from unlora.model.reference import POLICY, adapters_off, switched

# kinds of attention that compute in float32, too
FLOAT32_TOO = ("sdpa", "eager")
SAVED = "saved"
USELESS = ". Nothing usable was written."

# largest difference between logits that rounding explains, relative to their largest size: of a
# model that is asked in float32, and of one that can only be asked in the dtype of its weights
ROUNDING = 1e-3
ROUNDING_OF = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
# adapters that do less than this to log-probabilities, relative to the largest, do nothing
UNSEEN = 1e-5
EXPERT = re.compile(r"\.experts\.\d+\.")
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


def tolerance(model: nn.Module) -> float:
    """The largest difference that rounding explains, relative to the largest logit."""
    if asked_in_float32(model):
        return ROUNDING
    if getattr(model, "is_quantized", False):
        return 0.1
    dtypes = {p.dtype for p in model.parameters()} & ROUNDING_OF.keys()
    return max((ROUNDING_OF[dtype] for dtype in dtypes), default=ROUNDING)


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
