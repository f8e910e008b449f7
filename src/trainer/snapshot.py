"""Copy what a training step changes to main memory, for a rollback."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unlora.trainer.method_state import MethodState


@dataclass(frozen=True)
class Snapshot:
    """Trained weights, optimiser and what the objective remembers."""

    weights: Mapping[str, Tensor]
    optimizer: Any
    state: Mapping[str, Tensor]

    @classmethod
    def take(
        cls, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, state: MethodState
    ) -> "Snapshot":
        """Copy the trained parameters, the optimiser and the state of the method."""
        return cls(
            {name: _to_cpu(parameter) for name, parameter in parameters.items()},
            _to_cpu(optimizer.state_dict()),
            {name: tensor.clone() for name, tensor in state.state_dict().items()},
        )

    def restore(
        self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, state: MethodState
    ) -> None:
        """Put everything back; the learning rates stay those of the schedule."""
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.weights[name])
        rates = [group["lr"] for group in optimizer.param_groups]
        optimizer.load_state_dict(copy.deepcopy(self.optimizer))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        state.load_state_dict(self.state)


def _to_cpu(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: _to_cpu(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [_to_cpu(value) for value in state]
    return state
