"""Offer the metrics of ``configs/metrics/SUITE.yaml`` as Hydra's group ``eval/SUITE_metrics``."""

import functools
from importlib import resources
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf


def shipped_metrics(suite: str) -> dict[str, dict[str, Any]]:
    """The settings of every metric that is shipped for ``tofu``, ``muse``, ``rwku`` or ``own``."""
    file = resources.files("unlora.configs").joinpath("metrics", f"{suite}.yaml")
    metrics: dict[str, dict[str, Any]] = yaml.safe_load(file.read_text("utf-8"))
    return metrics


@functools.cache
def register_metrics() -> None:
    """Add the shipped metrics to Hydra's store; each goes to ``eval.SUITE.metrics.NAME``."""
    for file in resources.files("unlora.configs").joinpath("metrics").iterdir():
        suite = file.name.removesuffix(".yaml")
        for name, settings in shipped_metrics(suite).items():
            ConfigStore.instance().store(
                name=name,
                node=OmegaConf.create(settings),
                group=f"eval/{suite}_metrics",
                package=f"eval.{suite}.metrics.{name}",
                provider="unlora",
            )
