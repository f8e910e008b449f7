"""Load the model that an evaluation asks, when it is first asked something new."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from peft import PeftModel
from torch import nn

from unlora.evals.passes.batching import needs_all_processes
from unlora.forward.modes import unwrapped
from unlora.model.reference import adapters_off

NO_ADAPTERS = "the model has no adapter to switch off, so there is no root model beside it"
MERGED = (
    "earlier adapters were added to the weights for training, so the root model is not at hand. "
    "Evaluate the run folder afterwards: unlora eval"
)
SPLIT = (
    "the weights are split over processes, and a gradient norm needs them whole. Evaluate the run "
    "folder afterwards: unlora eval"
)


@dataclass(frozen=True)
class LazyModel:
    """A model that is loaded when it is first asked something new.

    Attributes:
        load: gives the model.
        key: names all that its answers depend on beside the question; None: nothing is kept.
        root_key: the same of its root model.
        no_root: why its root model cannot be asked, where that is so.
        no_gradients: why no gradient norm can be taken of it, where that is so.
        is_target: whether nothing was made to forget yet.
    """

    load: Callable[[], nn.Module]
    key: str | None = None
    root_key: str | None = None
    no_root: str | None = None
    no_gradients: str | None = None
    is_target: bool = False

    @classmethod
    def of(cls, model: "nn.Module | LazyModel") -> "LazyModel":
        """A model that is there already; what it says is not kept, as it may yet be trained."""
        if isinstance(model, LazyModel):
            return model
        no_gradients = SPLIT if needs_all_processes(model) else None
        return cls(lambda: model, no_root=_no_root(model), no_gradients=no_gradients)

    @cached_property
    def model(self) -> nn.Module:
        """The model itself."""
        return self.load()

    @contextmanager
    def as_root(self) -> Iterator[nn.Module]:
        """The root model: the same weights with every adapter switched off."""
        lm = unwrapped(self.model)
        with adapters_off(lm):
            yield lm


def _no_root(model: nn.Module) -> str | None:
    lm: Any = unwrapped(model)
    if not isinstance(lm, PeftModel):
        return NO_ADAPTERS
    lineage = getattr(lm, "lineage", None)
    below = [name for name in lm.peft_config if name.startswith("link")]
    return MERGED if lineage is not None and lineage.links and not below else None
