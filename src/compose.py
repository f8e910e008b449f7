"""A config as the command line would compose it, for whoever starts a run from Python."""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from unlora import mistakes
from unlora.commandline import normalised, quoted
from unlora.errors import InputError

LOGS = ("hydra.job_logging", "hydra.hydra_logging")
INSTANTIATED = ("hydra.callbacks", "hydra.launcher", "hydra.sweeper")
SECTION = re.compile(r"\s*\$\{(?!hydra\.(job\.name|(run|sweep)\.dir|runtime\.\w+)\}).*\}\s*")
# what a config may have called
KNOWN_CALLABLES = re.compile(
    r"hydra\._internal\.core_plugins\.[\w.]+|hydra_plugins\.[\w.]+|colorlog\.ColoredFormatter"
    r"|logging\.(StreamHandler|FileHandler|NullHandler|Formatter|handlers\.RotatingFileHandler)"
    r"|ext://sys\.std(out|err)"
)


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
    given = [word for folder in folders for word in ("--config-dir", folder)]
    args = normalised([*given, *words])[len(given) :]
    return _composed(name, tuple(args), folders).copy()


def _config_folders() -> tuple[str, ...]:
    """The folders with configs of the user's own, where this process runs under Hydra."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return ()
    sources = HydraConfig.get().runtime.config_sources
    return tuple(one.path for one in sources if one.provider == "command-line")


@functools.cache
def _composed(name: str, args: tuple[str, ...], folders: tuple[str, ...]) -> Any:
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    from unlora.config import resolution_mistake, without_environment

    state = GlobalHydra.get_state() if GlobalHydra.instance().is_initialized() else None
    GlobalHydra.instance().clear()
    try:
        with (
            without_environment(),
            initialize_config_module("unlora.configs", version_base=None),
        ):
            places = ",".join(quoted(f"file://{folder}") for folder in folders)
            more = [f"hydra.searchpath=[{places}]"] if folders else []
            return compose(name, overrides=[*args, *more])
    except OverrideParseException as error:
        raise InputError(mistakes.unreadable(error.override.removeprefix("++"))) from error
    except MissingConfigException as error:
        raise InputError(
            mistakes.missing_config(str(error.missing_cfg_file), name, args)
        ) from error
    except (HydraException, OmegaConfBaseException) as error:
        if said := resolution_mistake(error):
            raise InputError(said) from error
        raise InputError(mistakes.composition_mistake(str(error), name, args)) from error
    finally:
        if state is not None:
            GlobalHydra.set_state(state)


@contextmanager
def only_known_callables(sweeps: list[str], say: Callable[[Exception], None]) -> Iterator[None]:
    """Hydra calls what a config names: callbacks, launchers, sweepers, handlers of logs.

    None but those of Hydra, its plug-ins and logging are called, and no variable of the environment
    is set: it could have another program called, or a token sent elsewhere.

    Args:
        sweeps: told the folder of every multirun.
        say: told what is wrong, as Hydra may not hand it on.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    load = ConfigLoaderImpl.load_configuration

    def checked(*args: Any, **kwargs: Any) -> Any:
        found = load(*args, **kwargs)
        content = OmegaConf.to_container(found, resolve=False)
        for mistake in map(InputError, _refused(content)):
            say(mistake)
            raise mistake
        with suppress(OmegaConfBaseException):
            if str(found.hydra.mode or "").endswith("MULTIRUN"):
                sweeps.append(str(found.hydra.sweep.dir))
        return found

    ConfigLoaderImpl.load_configuration = checked  # type: ignore[method-assign]
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = load  # type: ignore[method-assign]


def _refused(content: Any) -> Iterator[str]:
    """What is wrong with a whole config, unresolved."""
    for key, name in _called(content):
        if not KNOWN_CALLABLES.fullmatch(name):
            yield (
                f"The config would have {name!r} called ({key}). Only Hydra's own launchers, "
                "sweepers and log handlers may be named. Leave it out."
            )
    for part in ("env_set", "env_copy"):
        value = content
        for key in ("hydra", "job", part):
            value = value.get(key) if isinstance(value, dict) else value  # a text stands for a part
        if value:
            names = [value] if isinstance(value, str) else list(value)  # a value may be a token
            yield (
                f"hydra.job.{part} names {names}, and no config may set variables of the "
                "environment: they decide which programs run and where tokens are sent. Leave it "
                "out, and set the variable in your shell."
            )


def _called(content: Any, above: str = "") -> Iterator[tuple[str, str]]:
    """Every key below which stands the name of something to call or import, and that name.

    Where Hydra looks for such names, a value that stands for another part of the config is one,
    too: it may be a whole section.
    """
    pairs: Any = content.items() if isinstance(content, dict) else ()
    pairs = enumerate(content) if isinstance(content, list) else pairs
    for key, value in pairs:
        place = f"{above}{key}"
        if isinstance(value, str):
            logs = place.startswith(LOGS)
            if key == "_target_" or (logs and key in ("()", "class")):
                yield place, value
            elif logs and value.startswith(("ext://", "cfg://")):
                yield place, value
            elif place.startswith((*LOGS, *INSTANTIATED)) and SECTION.fullmatch(value):
                yield place, value
        yield from _called(value, f"{place}.")
