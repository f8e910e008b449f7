"""Declare the config of an audit."""

from collections.abc import Mapping
from typing import Any, Literal

from unlora.config import value_types as values
from unlora.config.resolve import plain
from unlora.config.schema import Section
from unlora.config.validation import checked

PARTS = ("forget", "retain", "holdout")


class AuditConfig(Section):
    """A whole config of ``audit``; ``audit`` maps the name of an attack to its section."""

    run: str
    audit: dict[str, dict[str, Any] | None]
    retain_model: str | None
    target: str
    delivered: Literal["merged", "adapter"]
    output_dir: str | None
    output: Literal["lines", "quiet", "json"]
    data: dict[Literal["forget", "retain", "holdout"], dict[str, Any]]
    datasets_dir: values.ExistingFolder
    batch_size: values.Count | None
    token_budget: values.Count | None
    max_new_tokens: values.Count | None
    cache: bool
    thresholds: dict[str, float]


def read_audit(cfg: Mapping[str, Any]) -> AuditConfig:
    """The checked config.

    Raises:
        InputError: every mistake found, one a line.
    """
    config: AuditConfig = checked(AuditConfig, plain(cfg))
    return config
