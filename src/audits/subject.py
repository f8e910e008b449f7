"""Load the models of an audit, and change them as an attack does."""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from unlora.evals.eval_model import LazyModel
from unlora.model import ResolvedModel, get_model
from unlora.model.adapter_scale import scale_adapter
from unlora.model.attach import put_on
from unlora.model.fingerprints import identities
from unlora.model.merge import merge_adapters
from unlora.model.quantised import placed
from unlora.model.reference import switched
from unlora.runs.hashes import digest

Asked = Callable[[], AbstractContextManager[nn.Module]]
Role = Literal["unlearned", "target", "retain"]


@dataclass(frozen=True)
class AuditedModel:
    """One of the three models of an audit, loaded when something new is to be asked of it.

    Attributes:
        path: as the user knows it.
        key: names all that its answers depend on; None where that cannot be told.
        scale: of its last adapter.
    """

    role: Role
    path: str
    resolved: ResolvedModel
    key: str | None
    scale: float = 1.0

    @classmethod
    def of(cls, role: Role, path: str, resolved: ResolvedModel) -> "AuditedModel":
        """A model by its run folder."""
        return cls(role, path, resolved, identities(resolved)[0])

    def at(self, scale: float) -> "AuditedModel":
        """The same with its last adapter scaled."""
        key = self.key if scale == 1 or self.key is None else digest(self.key, "scale", scale)
        return replace(self, scale=scale, key=key)

    def load(self) -> nn.Module:
        """The network with its adapters on it, unmerged."""
        network: Any = get_model(self.resolved, trainable=False)[0]
        if torch.cuda.is_available() and not placed(network):
            network.to("cuda")
        if self.scale != 1:
            scale_adapter(network, self.last_adapter, self.scale)
        return network

    @property
    def last_adapter(self) -> str:
        """The name of its last adapter on the loaded network."""
        return f"link{len(self.resolved.lineage.links) - 1}"

    def merged(self) -> nn.Module:
        """The plain network with its adapters in the weights."""
        with torch.no_grad():
            return merge_adapters(self.load()).requires_grad_(False).eval()

    def plain(self) -> LazyModel:
        """The model as it is; its answers are those of an evaluation."""
        return LazyModel(self.load, self.key)

    def changed(self, how: Callable[[], nn.Module], *parts: Any) -> LazyModel:
        """The model after an attack.

        Args:
            how: makes it.
            parts: all that the change depends on.
        """
        key = None if self.key is None else digest(self.key, "audit", *parts)
        return LazyModel(how, key)


@contextmanager
def side_by_side(own: AuditedModel, other: AuditedModel) -> Iterator[tuple[Asked, Asked]]:
    """Two models to be asked in turn; of one root they share its weights.

    Yields:
        For each a context in which the network in it answers as that model.
    """
    network = own.load()
    if own.key is not None and own.key == other.key:
        yield (lambda: nullcontext(network)), (lambda: nullcontext(network))
        return
    ours, theirs = own.resolved, other.resolved
    if ours.lineage.root != theirs.lineage.root or ours.load_kwargs != theirs.load_kwargs:
        second = other.load()
        yield (lambda: nullcontext(network)), (lambda: nullcontext(second))
        return
    names = [f"link{n}" for n in range(len(ours.lineage.links))]
    others = [f"other{n}" for n in range(len(theirs.lineage.links))]
    adapted: Any = network
    for name, link in zip(others, theirs.lineage.links, strict=True):
        adapted = put_on(adapted, link.path, name)
    if names:
        adapted.base_model.set_adapter(names)
    adapted.requires_grad_(False).eval()
    yield (lambda: _as(adapted, names)), (lambda: _as(adapted, others))


@contextmanager
def _as(network: Any, names: list[str]) -> Iterator[nn.Module]:
    with switched(network, names):
        yield network


@contextmanager
def collecting_soon() -> Iterator[None]:
    """Within, :func:`release` need not look through what is there already, libraries above all.

    What the caller's program has frozen stays so.
    """
    frozen_before = gc.get_freeze_count()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen_before:
            gc.unfreeze()


def release() -> None:
    """Give back the memory of models that nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
