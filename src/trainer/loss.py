"""Combine gamma * forget term + alpha * retain term."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from annotated_types import Ge
from torch import Tensor

from unlora.errors import InputError
from unlora.forward.outputs import Hidden, Padded, ScoredTokens
from unlora.objectives import EMPTY, TERMS, Term, View
from unlora.registry import out_of_range, unknown
from unlora.trainer import constraint as constraints
from unlora.trainer.constraint import CONSTRAINTS, Constraint

FINETUNE = "FinetuneTrainer"
SUBTRACTED = ("Negation", "PerTA")  # see unlora.trainer.task_vector
Totals = Mapping[str, Tensor]  # "forget", "retain" -> number of losses in the effective batch


@dataclass(frozen=True)
class UnlearningLoss:
    """What one step minimises; fine-tuning is the case without a forget term.

    Attributes:
        handler: the name that the config knows it by.
        forget, retain: configured terms, each with its weight; None where the weight is 0.
        constraint: how the weight of the retain term follows its value, where it does.
    """

    handler: str
    forget: Term | None
    retain: Term | None
    gamma: float = 1.0
    alpha: float = 1.0
    constraint: Constraint | None = None

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
            if wanted := out_of_range(weight, [Ge(0)]):
                raise InputError(f"method_args.{name} is {weight!r}; it must be {wanted}.")
        if handler == FINETUNE:
            forget, retain_loss_type = None, retain_loss_type or "NLL"
            if hyper:
                raise InputError(f"{FINETUNE} takes no method_args, but has {', '.join(hyper)}.")
        else:
            forget = _of_part(handler, "forget", "alternate")
        retain = _of_part(retain_loss_type, "retain") if retain_loss_type else None
        forget, retain, constraint = _configured(handler, forget, retain, hyper, alpha)
        terms = forget if gamma else None, retain if alpha else None
        loss = cls(handler, *terms, gamma, alpha, constraint)
        if loss.forget is None and loss.retain is None:
            raise InputError(
                f"{handler} with gamma {gamma} and alpha {alpha} has nothing to minimise."
            )
        if constraint and (loss.retain is None or loss.forget is None):
            raise InputError(
                f"{handler} holds the retain loss below a bound, so it needs both: "
                "set trainer.method_args.retain_loss_type=NLL, and alpha and gamma above 0."
            )
        if handler == "BLADE" and any(
            x.startswith("reference_") for x in loss.terms["retain"].views
        ):
            raise InputError(
                f"BLADE finds its bound from the retain loss at the start, which is 0 for "
                f"{retain_loss_type}. Set trainer.method_args.retain_loss_type=NLL."
            )
        if handler in SUBTRACTED and (loss.retain is not None or loss.forget is None):
            raise InputError(
                f"{handler} subtracts all that it learns, so it learns forget data alone. Set "
                "trainer.method_args.alpha=0 and gamma=1."
            )
        return loss

    @property
    def terms(self) -> dict[str, Term]:
        """``forget`` and ``retain``, as far as they have a weight."""
        both = {"forget": self.forget, "retain": self.retain}
        return {name: term for name, term in both.items() if term is not None}

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term."""
        both = {"forget": self.gamma, "retain": self.alpha}
        return {name: both[name] for name in self.terms}

    @property
    def views(self) -> dict[str, type]:
        """Whom one step asks about what, each once, policy before reference, and how."""
        kinds = {view: kind for term in self.terms.values() for view, kind in term.views.items()}
        return dict(sorted(kinds.items()))

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the data those passes need."""
        wanted = {view.split("_")[1] for view in self.views}
        if "alternate" in wanted:
            wanted.add("forget")  # alternate answers come with the questions they answer
        return tuple(part for part in ("forget", "retain", "alternate") if part in wanted)

    @property
    def layer(self) -> int | None:
        """The decoder layer whose hidden states a term looks at."""
        return next((x.layer for x in self.terms.values() if x.layer is not None), None)

    @property
    def ends_at_layer(self) -> bool:
        """Whether no gradient comes from above ``layer``: the policy is asked about it alone."""
        kinds = [kind for view, kind in self.views.items() if view.startswith("policy_")]
        return all(kind is Hidden for kind in kinds)

    def asked_of_reference(self, *kinds: type) -> list[str]:
        """The views in which the reference is asked; of these kinds, where some are given."""
        return [
            view
            for view, kind in self.views.items()
            if view.startswith("reference_")
            and kind is not ScoredTokens
            and (not kinds or kind in kinds)
        ]

    def losses(
        self,
        views: Mapping[str, View],
        totals: Totals | None = None,
        *,
        drawn: Mapping[str, Tensor] = EMPTY,
        row_weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Each term's loss of one micro-batch, without its weight; of the terms in ``views``.

        Args:
            totals: how many losses each term has in the whole effective batch. With them every
                micro-batch gives its share, and the shares add up to the mean over the effective
                batch however it was split; without them, the mean of this batch.
            drawn: the tensors that terms draw before the first step.
            row_weights: float [rows]; the forget loss is the sum of its rows' means with these.
        """
        losses = {}
        for name, term in self.terms.items():
            if not set(term.views) <= set(views):
                continue
            values = term(views, drawn)
            if name == "forget" and row_weights is not None:
                losses[name] = (row_weights * self.by_row(values, views)).sum()
            else:
                losses[name] = (
                    values.mean() if totals is None else values.sum() / totals[name].clamp(min=1)
                )
        return losses

    def by_row(self, values: Tensor, views: Mapping[str, View], *, empty: float = 0.0) -> Tensor:
        """The forget term's losses, one for each row: the mean over its tokens.

        Args:
            empty: that of a row all of whose tokens are left out.
        """
        assert self.forget is not None
        if self.forget.unit == "rows":
            return values
        tokens = views[next(iter(self.forget.views))]
        assert isinstance(tokens, ScoredTokens) and not isinstance(tokens, Padded)
        row = tokens.row[tokens.position >= self.forget.skipped]
        counts = torch.bincount(row, minlength=tokens.rows)
        means = values.new_zeros(tokens.rows).index_add(0, row, values) / counts.clamp(min=1)
        return torch.where(counts > 0, means, empty)


def _of_part(name: str, *parts: str) -> Term:
    """The term of this name, if it is one for this part of the data."""
    term = TERMS[name]
    if term.part not in parts:
        fitting = [other for other in TERMS if TERMS[other].part in parts]
        raise InputError(f"{name} is not a {parts[0]} loss. Choose one of: {', '.join(fitting)}.")
    return term


def _configured(
    handler: str,
    forget: Term | None,
    retain: Term | None,
    hyper: Mapping[str, object],
    alpha: float,
) -> tuple[Term | None, Term | None, Constraint | None]:
    """Give each parameter to whoever has one of that name: a term, or the constraint."""
    kind = CONSTRAINTS.get(handler)
    own = constraints.settings_of(kind) if kind else {}
    known = {**(forget.hyper if forget else {}), **(retain.hyper if retain else {}), **own}
    for name in hyper:
        if name not in known:
            raise InputError(unknown(f"parameter of objective {handler}", name, known))

    def settings_of(names: Mapping[str, object]) -> dict[str, object]:
        return {name: value for name, value in hyper.items() if name in names}

    return (
        forget and forget.configure(**settings_of(forget.hyper)),
        retain and retain.configure(**settings_of(retain.hyper)),
        constraints.build(handler, settings_of(own), alpha) if kind else None,
    )
