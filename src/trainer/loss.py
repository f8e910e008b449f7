"""gamma * forget term + alpha * retain term."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unlora.errors import InputError
from unlora.objectives import TERMS, Term
from unlora.outputs import Outputs

FINETUNE = "FinetuneTrainer"
Totals = Mapping[str, Tensor]  # "forget", "retain" -> number of losses in the effective batch


@dataclass(frozen=True)
class UnlearningLoss:
    """What one step minimises; fine-tuning is the case without a forget term.

    Attributes:
        forget, retain: configured terms, each with its weight; None where the weight is 0.
    """

    forget: Term | None
    retain: Term | None
    gamma: float = 1.0
    alpha: float = 1.0

    @classmethod
    def build(
        cls,
        handler: str,
        *,
        retain_loss_type: str | None = None,
        gamma: float = 1.0,
        alpha: float = 1.0,
        **hyper: object,
    ) -> "UnlearningLoss":
        """The loss that ``trainer.handler`` and ``trainer.method_args`` of a config name.

        Raises:
            InputError: unknown objective, retain loss or parameter, or nothing to minimise.
        """
        for name, weight in (("gamma", gamma), ("alpha", alpha)):
            if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                raise InputError(f"method_args.{name} is {weight!r}; it must be a number.")
        if handler == FINETUNE:
            handler_term, retain_loss_type = None, retain_loss_type or "NLL"
            if hyper:
                raise InputError(f"{FINETUNE} takes no method_args, but has {', '.join(hyper)}.")
        else:
            handler_term = _of_part(handler, "forget", "alternate").configure(**hyper)
        retain = _of_part(retain_loss_type, "retain") if retain_loss_type else None
        loss = cls(handler_term if gamma else None, retain if alpha else None, gamma, alpha)
        if loss.forget is None and loss.retain is None:
            raise InputError(
                f"{handler} with gamma {gamma} and alpha {alpha} has nothing to minimise."
            )
        return loss

    @property
    def terms(self) -> dict[str, Term]:
        """``forget`` and ``retain``, as far as they have a weight."""
        both = {"forget": self.forget, "retain": self.retain}
        return {name: term for name, term in both.items() if term is not None}

    @property
    def views(self) -> tuple[str, ...]:
        """The forward passes one step needs, policy passes before reference passes, each once."""
        return tuple(sorted({view for term in self.terms.values() for view in term.views}))

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the data those passes need."""
        wanted = {view.split("_")[1] for view in self.views}
        if "alternate" in wanted:
            wanted.add("forget")  # alternate answers come with the questions they answer
        return tuple(part for part in ("forget", "retain", "alternate") if part in wanted)

    @property
    def needs_reference(self) -> bool:
        """Whether any term asks what the model said before."""
        return any(view.startswith("reference_") for view in self.views)

    def __call__(
        self, views: Mapping[str, Outputs], totals: Totals | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch.

        Args:
            totals: how many losses each term has in the whole effective batch. With them every
                micro-batch gives its share, and the shares add up to the mean over the effective
                batch however it was split; without them, the mean of this batch.

        Returns:
            The weighted sum, and ``forget_loss`` and ``retain_loss`` without their weights.
        """

        weights = {"forget": self.gamma, "retain": self.alpha}
        weighted, logged = [], {}
        for name, term in self.terms.items():
            values = term(views)
            loss = values.mean() if totals is None else values.sum() / totals[name]
            logged[f"{name}_loss"] = loss.detach()
            weighted.append(weights[name] * loss)
        return torch.stack(weighted).sum(), logged


def _of_part(name: str, *parts: str) -> Term:
    """The term of this name, if it is one for this part of the data."""
    term = TERMS[name]
    if term.part not in parts:
        fitting = [other for other in TERMS if TERMS[other].part in parts]
        raise InputError(f"{name} is not a {parts[0]} loss. Choose one of: {', '.join(fitting)}.")
    return term
