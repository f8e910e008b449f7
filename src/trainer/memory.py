"""What a run holds, as a copy to go back to; and micro-batches that do not fit into memory."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from unlora.trainer.trainer import UnlearningTrainer


@dataclass(frozen=True)
class Copy:
    """Trained weights, optimiser and what the objective remembers, in main memory."""

    weights: Mapping[str, Tensor]
    optimiser: Any
    remembered: Mapping[str, Tensor]

    @classmethod
    def of(cls, trainer: "UnlearningTrainer") -> "Copy":
        weights = {n: p.detach().to("cpu", copy=True) for n, p in _trained(trainer).items()}
        optimiser = _to_cpu(trainer.optimizer.state_dict())
        return cls(weights, optimiser, {n: t.clone() for n, t in trainer.remembered().items()})

    def restore(self, trainer: "UnlearningTrainer") -> None:
        """Put everything back; the learning rates stay those of the schedule."""
        with torch.no_grad():
            for name, parameter in _trained(trainer).items():
                parameter.copy_(self.weights[name])
        optimiser = trainer.optimizer
        rates = [group["lr"] for group in optimiser.param_groups]
        optimiser.load_state_dict(copy.deepcopy(self.optimiser))
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate
        trainer.recall(self.remembered)


def _trained(trainer: "UnlearningTrainer") -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}


def _to_cpu(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: _to_cpu(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [_to_cpu(value) for value in state]
    return state
