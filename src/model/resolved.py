"""Resolve a model section once: what it loads, from where, and of which architecture."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PretrainedConfig

from unlora.config.schema import ModelSection
from unlora.model.lineage import Lineage
from unlora.model.load import load_args, resolve, root_config
from unlora.model.quantised import quantisation


@dataclass(frozen=True)
class ResolvedModel:
    """A model section with what it stands for; ``unlora.model.resolve_model`` makes one.

    Files are read when something first needs them, and once.

    Attributes:
        section: with the defaults of the run that trained the model, where it asks for those.
        known_lineage: its lineage, where that has been read already.
    """

    section: ModelSection
    known_lineage: Lineage | None = field(default=None, repr=False)

    @cached_property
    def _args(self) -> dict[str, Any]:
        return load_args(self.section)

    @property
    def path(self) -> str:
        """The run folder, model folder or hub repository."""
        return self._args["pretrained_model_name_or_path"]

    @cached_property
    def load_kwargs(self) -> Mapping[str, Any]:
        """Keyword arguments of ``from_pretrained``."""
        return {k: v for k, v in self._args.items() if k != "pretrained_model_name_or_path"}

    @property
    def trusts_code(self) -> bool:
        """Whether code of the model's repository may be run."""
        return bool(self.load_kwargs.get("trust_remote_code"))

    @cached_property
    def lineage(self) -> Lineage:
        """The root model and the adapters on it.

        Raises:
            InputError: there is no model, or its lineage is broken.
        """
        base = self.section.base
        return self.known_lineage or Lineage.read(self.path, base and resolve(base))

    @cached_property
    def _root_config(self) -> PretrainedConfig:
        return root_config(self.lineage, self.load_kwargs)

    @property
    def architecture(self) -> PretrainedConfig:
        """The config of the root model; a copy, as transformers writes into the one it is given.

        Raises:
            InputError: it is out of reach, or of a kind that is not supported.
        """
        return deepcopy(self._root_config)

    @cached_property
    def quantised(self) -> Mapping[str, Any]:
        """How the root's weights are quantised; empty where they are not."""
        return quantisation(self.architecture, self.load_kwargs, self.lineage.root)
