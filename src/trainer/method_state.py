"""Hold the tensors that a method carries from step to step, and save them in checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unlora.trainer import constraint as constraints
from unlora.trainer.constraint import Constraint
from unlora.trainer.gradients import Gradient
from unlora.trainer.loss import UnlearningLoss


@dataclass
class MethodState:
    """What an objective and its plug-ins remember.

    Attributes:
        device: where the tensors are.
        drawn: the tensors that terms draw before the first step.
        constraint: the bound on the retain loss, with its multiplier.
        retain_average: GRU's moving average of the retain gradient.
    """

    device: torch.device
    drawn: dict[str, Tensor] = field(default_factory=dict)
    constraint: Constraint | None = None
    retain_average: Gradient | None = None

    @classmethod
    def draw(
        cls, loss: UnlearningLoss, *, width: int, seed: int, device: torch.device
    ) -> "MethodState":
        """Make the state before the first step; ``width`` is that of the model."""
        drawn = {
            name: draw(width, seed).to(device)
            for term in loss.terms.values()
            for name, draw in term.draws.items()
        }
        return cls(device, drawn, loss.constraint)

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything on the CPU."""
        tensors = {f"drawn.{name}": tensor for name, tensor in self.drawn.items()}
        if self.constraint is not None:
            for name, value in constraints.state(self.constraint).items():
                tensors[f"constraint.{name}"] = torch.tensor(value, dtype=torch.float64)
        average = enumerate(self.retain_average or ())
        tensors |= {f"retain_average.{i}": tensor for i, tensor in average}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state_dict` gave."""
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            part, name = key.split(".", 1)
            parts.setdefault(part, {})[name] = tensor.to(self.device)
        self.drawn |= parts.get("drawn", {})
        if self.constraint is not None:
            values = parts.get("constraint", {})
            constraints.restore(self.constraint, {name: float(x) for name, x in values.items()})
        average = parts.get("retain_average", {})
        self.retain_average = [average[str(i)] for i in range(len(average))] or None
