"""Offer the metrics of ``configs/metrics/SUITE.yaml`` as Hydra's group ``eval/SUITE_metrics``."""

import functools
from importlib import resources
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore

Metrics = dict[str, dict[str, Any]]


def shipped_metrics(suite: str) -> Metrics:
    """The settings of every metric that is shipped for ``tofu``, ``muse``, ``rwku`` or ``own``."""
    return {name: each for section in _sections(suite).values() for name, each in section.items()}


class _SharedStore(dict[str, Any]):
    """Hydra copies its whole store for every composition, and again what it loads from it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_SharedStore":
        return self


@functools.cache
def register_metrics() -> None:
    """Add the shipped metrics to Hydra's store: one by its name, the usual ones as ``default``."""
    store = ConfigStore.instance()
    store.repo = _SharedStore(store.repo)
    for file in resources.files("unlora.configs").joinpath("metrics").iterdir():
        suite = file.name.removesuffix(".yaml")
        sections = _sections(suite)
        options = {
            name: {name: each} for group in sections.values() for name, each in group.items()
        }
        for option, metrics in {**options, "default": sections["default"]}.items():
            store.store(
                name=option,
                node=metrics,
                group=f"eval/{suite}_metrics",
                package=f"eval.{suite}.metrics",
                provider="unlora",
            )


def _sections(suite: str) -> dict[str, Metrics]:
    file = resources.files("unlora.configs").joinpath("metrics", f"{suite}.yaml")
    sections: dict[str, Metrics] = yaml.safe_load(file.read_text("utf-8"))
    return sections
