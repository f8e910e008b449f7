"""Unlearning objectives: pure functions from what models said to a loss.

One file per idea. The signature is the declaration:

* *positional* parameters name whom a term asks about what, as
  ``{policy,reference}_{forget,retain,alternate}``, and their types what it wants to know, which is
  what is computed (see ``unlora.forward.outputs``: ``TokenLogps`` for the answer's probability
  alone, ``Outputs`` for logits, ``Hidden`` for one layer,
  ``SequenceLogps`` for a number that of a reference is computed only once, ...);
* *keyword-only* parameters are the hyper-parameters that a config may set; ``layer`` is the decoder
  layer that ``Hidden`` looks at;
* the *return type* says what the loss is a mean over: ``Float[Tensor, " tokens"]`` holds one loss
  per scored token, ``Float[Tensor, " rows"]`` one per row, of the part that the first parameter
  names. ``Float[Tensor, ""]`` is one loss for a micro-batch as a whole; it depends on how a batch
  is split, so only losses made elsewhere that way have it.

The trainer reads all three, runs exactly those passes and takes the mean over the *effective*
batch. That is why a term returns its values and not their mean: the mean of a micro-batch depends
on how the batch was split, the mean of all its rows or tokens does not.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import get_type_hints

from torch import Tensor

from unlora.forward import IGNORE_INDEX
from unlora.forward.outputs import Hidden, Outputs, Padded, ScoredTokens, SequenceLogps, TokenLogps
from unlora.registry import Registry, check_settings, unknown

PARTS = ("forget", "retain", "alternate")
VIEWS = tuple(f"{who}_{part}" for who in ("policy", "reference") for part in PARTS)
UNITS = {"tokens": "tokens", "rows": "rows", "": "batches"}  # dimension -> what it counts
KINDS = (TokenLogps, Outputs, Hidden, SequenceLogps, ScoredTokens, Padded)
EMPTY: Mapping[str, Tensor] = MappingProxyType({})
View = TokenLogps | Outputs | Hidden | SequenceLogps | ScoredTokens | Padded
Draw = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Term:
    """A loss term and what it declares by its signature.

    Attributes:
        views: whom it asks about what, in the order of its parameters, and what it wants to know.
        unit: what its values are counted in: ``tokens``, ``rows`` or ``batches``.
        hyper: the hyper-parameters and their values.
        skips: the hyper-parameter that says how many of each row's first tokens have no loss.
        draws: tensors that are drawn once, before the first step: name -> function of the model's
            width and a seed.
        declared: the function, whose annotations say in which range a hyper-parameter may be, or
            which few words.
    """

    name: str
    fn: Callable[..., Tensor]
    views: Mapping[str, type]
    unit: str
    hyper: Mapping[str, object]
    skips: str | None = None
    draws: Mapping[str, Draw] = field(default_factory=dict)
    declared: Callable[..., Tensor] | None = None

    def __call__(self, views: Mapping[str, View], drawn: Mapping[str, Tensor] = EMPTY) -> Tensor:
        """One loss per row or token or in all, see ``unit``.

        Args:
            drawn: the tensors that ``draws`` names.
        """
        return self.fn(*(views[name] for name in self.views), **{x: drawn[x] for x in self.draws})

    @property
    def part(self) -> str:
        """The part of the data that its values belong to."""
        return next(iter(self.views)).split("_")[1]

    @property
    def layer(self) -> int | None:
        """The decoder layer whose hidden states it looks at."""
        return self.hyper["layer"] if Hidden in self.views.values() else None  # type: ignore[return-value]

    def count(self, labels: Tensor) -> int:
        """How many losses the term has on a batch with these labels (int64 [batch time])."""
        if self.unit == "batches":
            return 1
        if self.unit == "rows":
            return len(labels)
        # the first position of a row has no prediction, see unlora.forward.forward_pass.ask
        lengths = (labels[:, 1:] != IGNORE_INDEX).sum(-1)
        return int((lengths - self.skipped).clamp(min=0).sum())

    @property
    def skipped(self) -> int:
        """How many of each row's first tokens have no loss."""
        return int(str(self.hyper[self.skips])) if self.skips else 0

    def configure(self, **hyper: object) -> "Term":
        """The same term with these hyper-parameters.

        Raises:
            InputError: the term has no such parameter, or it wants another value.
        """
        check_settings(f"objective {self.name}", self.hyper, hyper, declared=self.declared)
        return replace(self, fn=partial(self.fn, **hyper), hyper={**self.hyper, **hyper})


TERMS: Registry[Term] = Registry("objective", __name__)


def objective(
    name: str, *, skips: str | None = None, draws: Mapping[str, Draw] | None = None
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a term under the name configs use for it.

    Args:
        skips: the keyword-only parameter that says how many of each row's first tokens the term
            leaves out; their losses are not among the values it returns.
        draws: keyword-only parameters that are no hyper-parameters but tensors, drawn once per run
            and saved with it: name -> function of the model's width and a seed.

    Raises:
        TypeError: the signature names a pass that does not exist, or no unit.
    """

    def register(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        signature = inspect.signature(fn)
        parameters = signature.parameters.values()
        hints = get_type_hints(fn)
        names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        for view in names:
            if view not in VIEWS:
                raise TypeError(unknown(f"pass in the signature of {fn.__name__}", view, VIEWS))
            if hints.get(view) not in KINDS:
                known = ", ".join(kind.__name__ for kind in KINDS)
                raise TypeError(f"{view} of {fn.__name__} must have one of the types {known}.")
        unit = UNITS.get(getattr(signature.return_annotation, "dim_str", "none").strip())
        if unit is None:
            raise TypeError(
                f"{fn.__name__} must be declared to return one loss per scored token or per row: "
                f'-> Float[Tensor, " tokens"] or -> Float[Tensor, " rows"].'
            )
        keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        hyper = {key: default for key, default in keywords.items() if key not in (draws or {})}
        views = {view: hints[view] for view in names}
        if Hidden in views.values() and "layer" not in hyper:
            raise TypeError(f"{fn.__name__} looks at hidden states, so it needs a keyword layer.")
        TERMS.add(name, Term(name, fn, views, unit, hyper, skips, draws or {}, fn))
        return fn

    return register
