"""Declare attacks: one function each, whose signature says what it does.

The type of its first parameter is the declaration:

* :data:`MergedModel`, :data:`AdaptedModel`: the function changes the weights in place;
* :class:`Questions`: it returns other ways to ask, as changes of the data set's config;
* ``list[Scored]``: it computes scores from the answers of the data as evaluation scores them;
* ``Sampled``: it computes scores from texts that the model has sampled;
* :class:`TrainingData`: it returns short trainings, whose results are scored at some steps;
* :data:`PatchedLogps`: it computes scores from what the target says with inner states of the model.

Keyword-only parameters are the settings that a config may change. A score is a number per forget
row, the higher the more the model knows of it; NaN where the attack says nothing of a row.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NewType, get_type_hints

import numpy as np
from torch import nn

from unlora.audits.residual import Scores
from unlora.evals.records import Sampled, Scored
from unlora.registry import Registry, check_settings

MergedModel = NewType("MergedModel", nn.Module)  # type: ignore[valid-newtype]
"""The plain network with every adapter merged into its weights, to be changed in place."""

AdaptedModel = NewType("AdaptedModel", nn.Module)  # type: ignore[valid-newtype]
"""The root model with every adapter of its lineage on it, unmerged, to be changed in place."""

PatchedLogps = NewType("PatchedLogps", np.ndarray)
"""Float[ndarray, "layers rows"]: mean log-probability of each answer under the target, where the
hidden states behind each layer at the answer's positions are those of the audited model."""


def mean_logps(answers: Sequence[Scored]) -> Scores:
    """Mean log-probability of the tokens of each answer, in nats; NaN for one without a token."""
    return np.array([-answer.loss for answer in answers])


@dataclass(frozen=True)
class Questions:
    """What can be said of the forget rows without reading them.

    Attributes:
        columns: the columns of the data.
        config: the data set's section of the config.
        retain: how many retain rows there are; ``num_examples`` of them may be shown before.
    """

    columns: Sequence[str]
    config: Mapping[str, Any]
    retain: int


@dataclass(frozen=True)
class TrainingData:
    """How many rows an attacker may train on."""

    forget: int
    retain: int


@dataclass(frozen=True)
class ShortTraining:
    """LoRA on all linear layers of the merged model, by AdamW with a constant learning rate.

    Attributes:
        rows: numbers of the rows, in ``data``; forget rows that are trained on are not scored.
        steps: optimiser steps after which the forget rows are scored, rising.
    """

    data: Literal["forget", "retain"]
    rows: tuple[int, ...]
    learning_rate: float
    steps: tuple[int, ...]
    rank: int = 16
    batch_size: int = 8
    seed: int = 0


KINDS: dict[Any, str] = {
    list[Scored]: "score",
    Sampled: "sample",
    MergedModel: "merged",
    AdaptedModel: "adapted",
    Questions: "questions",
    TrainingData: "training",
    PatchedLogps: "patched",
}


@dataclass(frozen=True)
class Attack:
    """An attack and what it declares.

    Attributes:
        kind: what it does, one of :data:`KINDS`.
        settings: name -> default.
        of_adapters: it needs the adapter apart from the weights, which who gets merged weights has
            not: it counts only where the adapter is what is delivered. Target and retain model
            have no such adapter, and are asked plainly.
        version: raised when it comes to do something else, so that nothing cached is believed.
        check: raises InputError where its settings do not go together.
    """

    name: str
    fn: Callable[..., Any]
    kind: str
    settings: Mapping[str, Any]
    of_adapters: bool
    version: int
    check: Callable[[Mapping[str, Any]], None]

    def configured(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """All its settings.

        Raises:
            InputError: it has no such setting, not of that kind, or they do not go together.
        """
        check_settings(f"attack {self.name}", self.settings, changes, declared=self.fn)
        settings = {**self.settings, **changes}
        self.check(settings)
        return settings


ATTACKS: Registry[Attack] = Registry("attack", "unlora.audits.attacks")


def attack(
    name: str,
    *,
    of_adapters: bool = False,
    version: int = 1,
    check: Callable[[Mapping[str, Any]], None] = lambda settings: None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register an attack under the name that configs use as its ``handler``.

    Raises:
        TypeError: the signature does not say what the attack does.
    """

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        parameters = list(inspect.signature(fn).parameters.values())
        hints = get_type_hints(fn)
        first = hints.get(parameters[0].name) if parameters else None
        if first not in KINDS:
            known = ", ".join(getattr(kind, "__name__", str(kind)) for kind in KINDS)
            raise TypeError(
                f"the first parameter of {fn.__name__} must have one of the types {known}."
            )
        settings = {p.name: p.default for p in parameters[1:]}
        ATTACKS.add(name, Attack(name, fn, KINDS[first], settings, of_adapters, version, check))
        return fn

    return register
