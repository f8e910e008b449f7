"""Compose a config from Python as the command line would."""

import functools
from collections.abc import Sequence
from typing import Any

from unlora.cli import messages
from unlora.cli.hydra_checks import only_known_packages
from unlora.cli.overrides import normalised, quoted
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
    folders = _config_folders()
    options = [word for folder in folders for word in ("--config-dir", folder)]
    args = normalised([*options, *words])[len(options) :]
    return _composed(name, tuple(args), folders).copy()


def _config_folders() -> tuple[str, ...]:
    """The folders with configs of the user's own, where this process runs under Hydra."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return ()
    sources = HydraConfig.get().runtime.config_sources
    return tuple(source.path for source in sources if source.provider == "command-line")


@functools.cache
def _composed(name: str, args: tuple[str, ...], folders: tuple[str, ...]) -> Any:
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    from unlora.config.metrics import register_metrics
    from unlora.config.resolve import resolution_mistake, without_environment

    register_metrics()
    state = GlobalHydra.get_state() if GlobalHydra.instance().is_initialized() else None
    GlobalHydra.instance().clear()
    try:
        with (
            without_environment(),
            only_known_packages(),
            initialize_config_module("unlora.configs", version_base=None),
        ):
            places = ",".join(quoted(f"file://{folder}") for folder in folders)
            more = [f"hydra.searchpath=[{places}]"] if folders else []
            return compose(name, overrides=[*args, *more])
    except OverrideParseException as error:
        raise InputError(messages.unreadable(error.override.removeprefix("++"))) from error
    except MissingConfigException as error:
        raise InputError(
            messages.missing_config(str(error.missing_cfg_file), name, args)
        ) from error
    except (HydraException, OmegaConfBaseException) as error:
        if mistake := resolution_mistake(error, args):
            raise InputError(mistake) from error
        message, cause = str(error), str(error.__cause__ or "")
        raise InputError(messages.composition_mistake(message, name, args, cause)) from error
    finally:
        if state is not None:
            GlobalHydra.set_state(state)
