"""Check what a config has Hydra do: whom it calls, which files it writes, what it imports.

An experiment may come from someone else, and Hydra calls what its own section names. So nothing but
Hydra's launchers, sweepers and log handlers is called, each with arguments that are known, and
files are written in the run folder alone.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from unlora.errors import InputError
from unlora.runs.redaction import without_setting

LOGS = ("hydra.job_logging", "hydra.hydra_logging")
PLUGINS = ("hydra.callbacks", "hydra.launcher", "hydra.sweeper")
PACKAGES = re.compile(r"unlora\.configs|hydra\.conf|hydra_plugins(\.\w+)*")  # with configs in them
# a whole value that stands elsewhere, and may be a section; but for those that are always texts
ELSEWHERE = re.compile(
    r"\s*\$\{(?!hydra\.(job\.name|(run|sweep)\.dir|runtime\.\w+)\}).*\}\s*", re.DOTALL
)
STREAM = re.compile(r"ext://sys\.std(out|err)")
PLUGIN = re.compile(r"(hydra\._internal\.core_plugins|hydra_plugins)(\.\w+)+(Launcher|Sweeper)")
HANDLER = re.compile(
    r"logging\.(StreamHandler|FileHandler|NullHandler|handlers\.RotatingFileHandler)"
)
FORMATTER = re.compile(r"logging\.Formatter|colorlog\.ColoredFormatter")
OF_HANDLERS = ("level", "formatter", "filters", "stream", "filename", "mode", "encoding", "delay",
               "errors", "maxBytes", "backupCount")  # fmt: skip
OF_FORMATTERS = ("format", "fmt", "datefmt", "style", "validate", "log_colors", "reset",
                 "secondary_log_colors", "no_color", "force_color")  # fmt: skip
# section of the logs -> what may be called there, and with which arguments
LOG_CALLS = {
    "handlers": (HANDLER, OF_HANDLERS),
    "formatters": (FORMATTER, OF_FORMATTERS),
    "filters": (re.compile("logging.Filter"), ("name",)),
}
STYLES = ("%", "$")  # { reaches whatever hangs on a record
# of launchers and sweepers: commands, other machines, functions, databases
REACH_OUT = ("setup", "python", "srun_args", "additional_parameters", "env_setup", "ray",
             "custom_search_space", "storage")  # fmt: skip
TYPED = re.compile(r"hydra\.(launcher|run|sweep)\b")  # the user's own, not a config's
LOG_FILES = (".log", ".txt")
FOLDERS = ("temp_folder", "submitit_folder")


@contextmanager
def only_known_packages() -> Iterator[None]:
    """Configs are read from no package but ours and Hydra's: reading them would import it."""
    from hydra._internal.config_repository import ConfigRepository

    initialize = ConfigRepository.initialize_sources

    def checked(self: Any, config_search_path: Any) -> None:
        for source in config_search_path.get_path():
            scheme, _, package = str(source.path).partition("://")
            package = package.replace("/", ".").rstrip(".")
            if scheme == "pkg" and not PACKAGES.fullmatch(package):
                raise InputError(
                    f"{source.path!r} would have the package {package!r} imported, which runs its "
                    "code. Give a folder of configs: --config-dir=FOLDER."
                )
        initialize(self, config_search_path)

    ConfigRepository.initialize_sources = checked  # type: ignore[method-assign]
    try:
        yield
    finally:
        ConfigRepository.initialize_sources = initialize  # type: ignore[method-assign]


@contextmanager
def only_known_callables(
    sweeps: list[str], shown: Callable[[Any], Any] | None = None
) -> Iterator[None]:
    """Check every config that Hydra composes before Hydra does what its own section says.

    Args:
        sweeps: told the folder of every multirun.
        shown: what of a config may be shown, where it is composed for that.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    load = ConfigLoaderImpl.load_configuration

    def checked(self: Any, config_name: Any, overrides: list[str], *args: Any, **more: Any) -> Any:
        cfg = load(self, config_name, overrides, *args, **more)
        content: Any = OmegaConf.to_container(cfg, resolve=False)
        for mistake in (*refused(content, overrides), *refused_files(cfg, overrides)):
            raise InputError(mistake)
        with suppress(OmegaConfBaseException):
            if str(cfg.hydra.mode or "").endswith("MULTIRUN"):
                sweeps.append(str(cfg.hydra.sweep.dir))
        if shown is not None:
            return _replaced(cfg, shown(content))
        if "MULTIRUN" not in str(more.get("run_mode")):  # where a job fails, Hydra prints them
            words = cfg.hydra.overrides.task
            cfg.hydra.overrides.task = [without_setting(word) for word in words]
        return cfg

    ConfigLoaderImpl.load_configuration = checked  # type: ignore[method-assign]
    try:
        with only_known_packages():
            yield
    finally:
        ConfigLoaderImpl.load_configuration = load  # type: ignore[method-assign]


def _replaced(cfg: Any, content: Mapping[str, Any]) -> Any:
    """A config with another content; of Hydra's own section, what was typed."""
    from omegaconf import open_dict, read_write

    with read_write(cfg), open_dict(cfg), read_write(cfg.hydra):
        for key in content:
            if key != "hydra":
                cfg[key] = content[key]
        for kind, words in content["hydra"]["overrides"].items():
            cfg.hydra.overrides[kind] = words
        cfg.hydra.job.override_dirname = content["hydra"]["job"]["override_dirname"]
    return cfg


def refused(content: Mapping[str, Any], typed: Sequence[str] = ()) -> Iterator[str]:
    """What is wrong with a whole config, unresolved.

    Args:
        typed: the overrides of the command line; what is typed there may run commands.
    """
    for section in LOGS:
        yield from _wrong_in_logs(_at(content, section), section)
    for section in PLUGINS:
        yield from _wrong_in_plugins(_at(content, section), section)
        yield from _untyped(content, section, typed)
    for key, value in _leaves(content):
        if key.split(".")[-1] == "_target_" and not key.startswith(PLUGINS):
            yield _called(key, value)
    for part in ("env_set", "env_copy"):
        if value := _at(content, f"hydra.job.{part}"):
            names = [value] if isinstance(value, str) else list(value)  # a value may be a token
            yield (
                f"hydra.job.{part} names {names}, and no config may set variables of the "
                "environment: they decide which programs run and where tokens are sent. Leave it "
                "out, and set the variable in your shell."
            )
    if folder := _at(content, "hydra.output_subdir"):
        yield (
            f"hydra.output_subdir is {folder!r}, and Hydra would write the config there, secrets "
            "and all. Leave it out: run_config.json holds the config."
        )


def _called(key: str, name: Any) -> str:
    return (
        f"The config would have {str(name)!r} called ({key}). Only Hydra's own launchers, sweepers "
        "and log handlers may be named. Leave it out."
    )


def _at(content: Any, key: str) -> Any:
    """The value under a dotted key; a text that stands for a part is the value of all its keys."""
    for step in key.split("."):
        content = content.get(step) if isinstance(content, Mapping) else content
    return content


def _leaves(content: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key with a value that is no section and no list."""
    pairs = content.items() if isinstance(content, Mapping) else enumerate(content)
    for key, value in pairs:
        if isinstance(value, (Mapping, list, tuple)):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _wrong_in_logs(section: Any, path: str) -> Iterator[str]:
    for key, value in _leaves(section if isinstance(section, (Mapping, list)) else {"": section}):
        name, where = str(value), f"{path}.{key}".rstrip(".")
        stream = key.split(".")[-1] == "stream"
        named = name.startswith(("ext://", "cfg://")) and not (stream and STREAM.fullmatch(name))
        if named or ELSEWHERE.fullmatch(name):
            yield _called(where, value)
    for kind, (callables, arguments) in LOG_CALLS.items():
        parts = _at(section, kind)
        for name, part in parts.items() if isinstance(parts, Mapping) else ():
            for key, value in part.items() if isinstance(part, Mapping) else ():
                where = f"{path}.{kind}.{name}.{key}"
                if key in ("class", "()"):
                    if not callables.fullmatch(str(value)):
                        yield _called(where, value)
                elif key not in arguments:
                    yield f"{where} is no setting of a log. Known: {', '.join(arguments)}."
                elif key == "style" and value not in STYLES:
                    yield f"{where} is {value!r}; it must be {' or '.join(STYLES)}."
                elif key == "stream" and not STREAM.fullmatch(str(value)):
                    yield f"{where} is {value!r}; it must be ext://sys.stdout or ext://sys.stderr."


def _wrong_in_plugins(section: Any, path: str) -> Iterator[str]:
    for key, value in _leaves(section if isinstance(section, (Mapping, list)) else {"": section}):
        where = f"{path}.{key}".rstrip(".")
        wanted = path != "hydra.callbacks" and key == "_target_" and PLUGIN.fullmatch(str(value))
        if (key.split(".")[-1] == "_target_" and not wanted) or ELSEWHERE.fullmatch(str(value)):
            yield _called(where, value)
        elif isinstance(value, str) and "\n" in value:  # a line more in the script of a job
            yield f"{where} is {value!r}; it must be one line."


def _untyped(content: Mapping[str, Any], path: str, typed: Sequence[str]) -> Iterator[str]:
    """Settings of a launcher or sweeper that reach out, and stand in a config."""
    section = _at(content, path)
    section = section if isinstance(section, Mapping) else {}
    default = dict(_leaves(_default(content, path)))
    keys = [word.lstrip("+~").partition("=")[0] for word in typed]
    for key, value in _leaves(section):
        where = f"{path}.{key}"
        shell = key.split(".")[0] in REACH_OUT and value is not None and default.get(key) != value
        if shell and not any(where == key or where.startswith(f"{key}.") for key in keys):
            yield (
                f"{where} may run a command, here or elsewhere, and no config may set it. Type it "
                f"on the command line: {path}.{key.split('.')[0]}=..."
            )


def _default(content: Mapping[str, Any], path: str) -> Any:
    """What a launcher or sweeper is set to where nobody sets anything."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    group = path.replace(".", "/")
    choice = _at(content, "hydra.runtime.choices")
    name = choice.get(group) if isinstance(choice, Mapping) else None
    with suppress(Exception):  # it comes from a file, and is no plug-in's own
        return OmegaConf.to_container(ConfigStore.instance().load(f"{group}/{name}.yaml").node)
    return {}


def refused_files(cfg: Any, typed: Sequence[str] = ()) -> Iterator[str]:
    """Files and folders of Hydra's that would lie outside the run folder, but for typed ones."""
    from omegaconf import OmegaConf

    home = _resolved(cfg, "paths.output_dir")
    keys = [word.lstrip("+~").partition("=")[0] for word in typed]
    for key, path in _files(cfg):
        moved = "hydra.sweep.dir" if key == "hydra.sweep.subdir" else key  # which is below it
        mine = [word for word in keys if TYPED.match(word)]
        if any(word in (key, moved) or key.startswith(f"{word}.") for word in mine):
            continue
        if path is None and home is None:  # nothing can be written, either
            continue
        log = key.endswith(".filename")
        if home is None or path is None or not _inside(path, home):
            target = path or _at(OmegaConf.to_container(cfg, resolve=False), key)
            where = f" {home!r}" if home else ""
            group = "/".join(key.split(".")[:2])
            instead = "begin it with ${paths.output_dir}/, or leave it out"
            if log and group in keys:  # a config of Hydra's, which names a file
                instead = f"add {key}='${{paths.output_dir}}/run.log', or leave {group} out"
            yield (
                f"{key} is {target!r}, which is not in the run folder{where}. Nothing is written "
                f"elsewhere: {instead}."
            )
        elif log and Path(path).suffix not in LOG_FILES:
            yield f"{key} is {path!r}; a log is called NAME{' or NAME'.join(LOG_FILES)}."
        elif log:
            os.makedirs(os.path.dirname(path), exist_ok=True)


def _files(cfg: Any) -> Iterator[tuple[str, str | None]]:
    """Dotted key -> where Hydra would write; None where that cannot be told."""
    from omegaconf import OmegaConf, open_dict

    multirun = str(cfg.hydra.mode or "").endswith("MULTIRUN")
    content: Any = OmegaConf.to_container(cfg.hydra, resolve=False)
    run, sweep = _resolved(cfg, "hydra.run.dir"), _resolved(cfg, "hydra.sweep.dir")
    copy = cfg.copy()
    OmegaConf.set_readonly(copy, False)
    with open_dict(copy):
        copy.hydra.job.num, copy.hydra.job.id = 0, "0"  # as the first of several jobs has them
    below = _resolved(copy, "hydra.sweep.subdir")
    job = None if sweep is None or below is None else os.path.join(sweep, below)
    if multirun:
        yield "hydra.sweep.dir", sweep
        yield "hydra.sweep.subdir", job
    elif run is None or Path(run) != Path():
        yield "hydra.run.dir", run
    logs = [key for key, _ in _leaves(content) if key.startswith(("job_logging", "hydra_logging"))]
    files = [f"hydra.{key}" for key in logs if key.split(".")[-1] == "filename"]
    folders = [f"hydra.launcher.{key}" for key in FOLDERS if _at(content, f"launcher.{key}")]
    if not (files or folders):
        return
    with open_dict(copy):
        copy.hydra.runtime.output_dir = job if multirun else run
    for key in (*files, *folders):
        yield key, _resolved(copy, key)


def _resolved(cfg: Any, key: str) -> str | None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    with suppress(OmegaConfBaseException, InputError):
        value = OmegaConf.select(cfg, key)
        return None if value is None else str(value)
    return None


def _inside(path: str, folder: str) -> bool:
    """Whether a path leads into a folder, links followed."""
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    return real == home or home in real.parents
