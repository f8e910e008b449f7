"""A config of ours, composed by Hydra inside a process that may run under Hydra itself."""

import functools
from collections.abc import Sequence

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from unlora.cli import normalised
from unlora.errors import InputError


def composed(name: str, overrides: Sequence[str]) -> DictConfig:
    """The config ``name`` (train, unlearn, eval) with these overrides; a copy of one's own.

    Raises:
        InputError: Hydra cannot compose it.
    """
    return _composed(name, tuple(overrides)).copy()


@functools.cache
def _composed(name: str, overrides: tuple[str, ...]) -> DictConfig:
    # the process itself may have been started by Hydra, which allows one at a time
    state = GlobalHydra.get_state() if GlobalHydra.instance().is_initialized() else None
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("unlora.configs", version_base=None):
            return compose(name, overrides=normalised(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        message = " ".join(str(error).split())
        raise InputError(f"{' '.join(overrides)}: {message}") from error
    finally:
        if state is not None:
            GlobalHydra.set_state(state)
