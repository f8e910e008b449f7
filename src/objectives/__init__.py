"""Unlearning objectives: pure functions from what models said to a loss.

One file per idea. The signature is the declaration:

* *positional* parameters name the forward passes a term needs, as
  ``{policy,reference}_{forget,retain,alternate}``;
* *keyword-only* parameters are the hyper-parameters that a config may set;
* the *return type* says what the loss is a mean over: ``Float[Tensor, " tokens"]`` holds one loss
  per scored token, ``Float[Tensor, " rows"]`` one per row, of the part that the first parameter
  names.

The trainer reads all three, runs exactly those passes and takes the mean over the *effective*
batch. That is why a term returns its values and not their mean: the mean of a micro-batch depends
on how the batch was split, the mean of all its rows or tokens does not.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from unlora.errors import InputError
from unlora.outputs import IGNORE_INDEX, Outputs
from unlora.registry import Registry, unknown

PARTS = ("forget", "retain", "alternate")
VIEWS = tuple(f"{who}_{part}" for who in ("policy", "reference") for part in PARTS)
UNITS = ("tokens", "rows")


@dataclass(frozen=True)
class Term:
    """A loss term and what it declares by its signature.

    Attributes:
        views: the forward passes it needs, in the order of its parameters.
        unit: what its values are counted in, ``tokens`` or ``rows``.
        hyper: the hyper-parameters and their values.
        skips: the hyper-parameter that says how many of each row's first tokens have no loss.
    """

    name: str
    fn: Callable[..., Tensor]
    views: tuple[str, ...]
    unit: str
    hyper: Mapping[str, object]
    skips: str | None = None

    def __call__(self, views: Mapping[str, Outputs]) -> Tensor:
        """One loss per row or token, see ``unit``."""
        return self.fn(*(views[name] for name in self.views))

    @property
    def part(self) -> str:
        """The part of the data that its values belong to."""
        return self.views[0].split("_")[1]

    def count(self, labels: Tensor) -> int:
        """How many losses the term has on a batch with these labels (int64 [batch time])."""
        if self.unit == "rows":
            return len(labels)
        # the first position of a row has no prediction, see unlora.outputs.ask
        lengths = (labels[:, 1:] != IGNORE_INDEX).sum(-1)
        skipped = int(str(self.hyper[self.skips])) if self.skips else 0
        return int((lengths - skipped).clamp(min=0).sum())

    def configure(self, **hyper: object) -> "Term":
        """The same term with these hyper-parameters.

        Raises:
            InputError: the term has no such parameter, or it wants a number.
        """
        for name, value in hyper.items():
            if name not in self.hyper:
                raise InputError(unknown(f"parameter of objective {self.name}", name, self.hyper))
            if isinstance(self.hyper[name], float) and not _is_number(value):
                raise InputError(
                    f"{name} of objective {self.name} is {value!r}; it must be a number."
                )
        return replace(self, fn=partial(self.fn, **hyper), hyper={**self.hyper, **hyper})


TERMS: Registry[Term] = Registry("objective", __name__)


def objective(
    name: str, *, skips: str | None = None
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a term under the name configs use for it.

    Args:
        skips: the keyword-only parameter that says how many of each row's first tokens the term
            leaves out; their losses are not among the values it returns.

    Raises:
        TypeError: the signature names a pass that does not exist, or no unit.
    """

    def register(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        signature = inspect.signature(fn)
        parameters = signature.parameters.values()
        views = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        for view in views:
            if view not in VIEWS:
                raise TypeError(unknown(f"pass in the signature of {fn.__name__}", view, VIEWS))
        unit = getattr(signature.return_annotation, "dim_str", "").strip()
        if unit not in UNITS:
            raise TypeError(
                f"{fn.__name__} must be declared to return one loss per scored token or per row: "
                f'-> Float[Tensor, " tokens"] or -> Float[Tensor, " rows"].'
            )
        hyper = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        TERMS.add(name, Term(name, fn, views, unit, hyper, skips))
        return fn

    return register


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
