"""A config as the command line would compose it, for whoever starts a run from Python."""

import functools
from collections.abc import Sequence
from typing import Any

from unlora import mistakes
from unlora.commandline import normalised
from unlora.errors import InputError


def composed(name: str, words: Sequence[str]) -> Any:
    """The config ``name`` with these words of a command line; a copy of one's own.

    Hydra allows one application at a time in a process; one that is running goes on afterwards.

    Args:
        name: ``train``, ``unlearn``, ``eval``, ...
        words: as users type them: ``experiment=unlearn/tofu/lora``, ``trainer=NPO``.

    Raises:
        InputError: a word is not understood, or names what is not there.
    """
    return _composed(name, tuple(normalised(words))).copy()


@functools.cache
def _composed(name: str, args: tuple[str, ...]) -> Any:
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    state = GlobalHydra.get_state() if GlobalHydra.instance().is_initialized() else None
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("unlora.configs", version_base=None):
            return compose(name, overrides=list(args))
    except OverrideParseException as error:
        raise InputError(mistakes.unreadable(error.override.removeprefix("++"))) from error
    except MissingConfigException as error:
        raise InputError(
            mistakes.missing_config(str(error.missing_cfg_file), name, args)
        ) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(mistakes.composition_mistake(str(error), name, args)) from error
    finally:
        if state is not None:
            GlobalHydra.set_state(state)
