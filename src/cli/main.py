"""Dispatch the command ``unlora``, and start every entry script.

``launch`` lets Hydra compose a config and hands it to a run function. What users type is accepted
as the documents of this field print it (``overrides.py``); what they mistype ends in one message
(``messages.py``) and exit code 2. Nothing heavy is imported here: help and mistakes in a config
must not wait for torch.
"""

import gc
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from unlora.cli.help import COMMANDS, overview, usage
from unlora.cli.messages import (
    composition_mistake,
    missing_config,
    refuse_foreign_experiment,
    refuse_foreign_flags,
    unknown_command,
    unreadable,
)
from unlora.cli.overrides import (
    EXPERIMENTS,
    beside_the_result,
    flag,
    given,
    normalised,
    with_own_data,
)
from unlora.errors import GuardError, InputError, system_in_words
from unlora.runs.atomic_files import is_main_process, write_text
from unlora.runs.redaction import guard_logs, remember_settings, safe, without_secrets_of_hydra

HELP = {"-h", "--help"}
DEMO = "experiment=study/pocket/lora"
# where nothing more is known: a training says what is kept of it
AFTER_CTRL_C = {
    "train": "Nothing was trained yet.",
    "unlearn": "Nothing was trained yet.",
    "eval": "Passes that were finished are kept: the same command goes on after them.",
    "study": "What is finished is kept: the same command goes on where this one was.",
    "alternates": "Nothing was written: the same command begins anew.",
    "audit": "What was asked until now is kept: the same command goes on where this one was.",
    "dial": "What was asked until now is kept: the same command goes on where this one was.",
    "forget": "What is finished is kept: the same command goes on where this one was.",
    "export": "Nothing usable was written: the same command begins anew.",
    "fetch-model": "Nothing was written: the same command begins anew.",
}
# where a command's ``run`` is
RECIPES = {
    "train": "recipes.train",
    "unlearn": "recipes.train",
    "eval": "recipes.evaluate",
    "alternates": "recipes.alternate_answers",
    "study": "studies.run_study",
}
MOST_LINES, LONGEST_LINE = 20, 2000  # of a message


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``unlora``."""
    guard_logs()
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command == "demo" and not HELP & set(rest):
        command, rest = "study", [DEMO, *rest]
    if command in (*HELP, "help"):
        print(usage(rest[0]) if rest and rest[0] in COMMANDS else overview())
    elif "--version" in (command, *rest):
        print(_version())
    elif command in EXPERIMENTS:
        module = f"unlora.{RECIPES[command]}"
        launch(lambda cfg: import_module(module).run(cfg), command, rest)
    elif command in COMMANDS and command != "report" and HELP & set(rest):
        print(usage(command, rest))
    else:
        with _mistakes_in_one_message(command):
            if command not in COMMANDS:
                raise InputError(unknown_command(command, COMMANDS))
            _silence_what_is_handled()
            import_module(f"unlora.cli.{command.replace('-', '_')}").main(rest)


def launch(run: Callable[[Any], Any], config_name: str, argv: Sequence[str] | None = None) -> None:
    """Compose the config that the command line asks for, and run with it.

    Args:
        config_name: the config if ``--config-name`` does not name another.
        argv: the command line without the program; that of this process if not given.
    """
    guard_logs()
    typed = sys.argv[1:] if argv is None else argv
    remember_settings(typed)
    with _mistakes_in_one_message(config_name):
        args = normalised(typed)
        name = (flag(args, "--config-name", "-cn") or config_name).removesuffix(".yaml")
        if HELP & set(args):
            print(usage(name, args))
            return
        if "--version" in args:
            print(_version())
            return
        refuse_broken_stack()
        refuse_foreign_flags(name, typed)
        refuse_foreign_flags(name, args)  # @--flag is a flag by now
        refuse_foreign_experiment(name, args)
        if name == "eval":
            args = beside_the_result(with_own_data(args))
        line = sys.argv if argv is None else [sys.argv[0], config_name, *argv]
        _run_hydra(run, config_name, name, args, line)


def _version() -> str:
    return f"unlora {import_module('importlib.metadata').version('unlora')}"


def refuse_broken_stack() -> None:
    """Stop where the installed packages do not fit together, which pip cannot express.

    Raises:
        InputError: peft before 0.19 with transformers 5, which it cannot import or load with.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        peft, transformers = version("peft"), version("transformers")
    except PackageNotFoundError as error:
        raise InputError(f"{error.name} is not installed. Run: pip install -e .") from error
    if tuple(map(int, peft.split(".")[:2])) < (0, 19) and int(transformers.split(".")[0]) >= 5:
        raise InputError(
            f"peft {peft} does not work with transformers {transformers}. "
            'Run: pip install -U peft, or: pip install "transformers<5".'
        )


def _run_hydra(
    run: Callable[[Any], Any], default: str, name: str, args: Sequence[str], typed: Sequence[str]
) -> None:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import MissingConfigException, OverrideParseException
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from unlora.cli.hydra_checks import only_known_callables, only_known_packages
    from unlora.config.metrics import register_metrics
    from unlora.config.resolve import resolution_mistake, without_environment
    from unlora.config.unused_keys import unused

    register_metrics()
    started = False
    told: set[str] = set()
    sweeps: list[str] = []
    collects = gc.isenabled()

    def hide() -> None:
        for sweep in sweeps:
            _hide_secrets_in(Path(sweep) / "multirun.yaml")

    def task(cfg: Any) -> Any:
        nonlocal started
        started = True
        if collects:
            gc.enable()
        _silence_what_is_handled()
        _leave_talking_to_the_first_process()
        settings = HydraConfig.get()
        several = settings.mode == RunMode.MULTIRUN
        hide()
        if several and not _has_own_folder(cfg, args):  # jobs never share a folder
            OmegaConf.update(cfg, "paths.output_dir", f"{cfg.paths.output_dir}/{settings.job.num}")
        sys.argv = list(typed)  # Hydra has read its own; this is for the record of the run
        try:
            if wrong := unused(cfg, given(args)):
                raise InputError("\n".join(wrong))
            with system_in_words():
                return run(cfg)
        except (InputError, GuardError) as error:
            told.add(str(error))
            _say(error)
            if several:  # the other jobs go on
                raise
            raise SystemExit(_exit_code(error)) from error

    before, sys.argv = sys.argv, [sys.argv[0], *args]  # Hydra reads it
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us as they are
    gc.disable()  # a config is many small things that stay: looking through them takes a fifth
    try:
        shows = flag(args, "--cfg", "-c", "--info", "-i") is not None
        checks = only_known_callables(sweeps, without_secrets_of_hydra if shows else None)
        if "--hydra-help" in args:  # of Hydra's own config, of which nothing is done
            checks = only_known_packages()
        with system_in_words(), _composed_once(args), checks, without_environment():
            hydra.main(config_path="pkg://unlora.configs", config_name=default, version_base=None)(
                task
            )()
    except (InputError, GuardError) as error:
        if str(error) not in told:
            _say(error)
        raise SystemExit(_exit_code(error)) from error
    except SystemExit as ended:  # Hydra has said what is wrong
        raise SystemExit(ended.code if started else 2 * bool(ended.code)) from ended
    except OverrideParseException as error:
        raise InputError(unreadable(error.override.removeprefix("++"))) from error
    except MissingConfigException as error:
        raise InputError(missing_config(str(error.missing_cfg_file), name, args)) from error
    except Exception as error:
        composing = not started or isinstance(error, OmegaConfBaseException)
        if composing and (text := resolution_mistake(error, args)):
            raise InputError(text) from error
        if started:
            raise
        # Hydra's own kinds, and what slips through it from odd values
        text, cause = str(error), str(error.__cause__ or "")
        raise InputError(composition_mistake(text, name, args, cause)) from error
    finally:
        hide()
        sys.argv = before
        if collects:
            gc.enable()


@contextmanager
def _composed_once(args: Sequence[str]) -> Iterator[None]:
    """Hydra composes every config twice, first only to find ``hydra.mode`` in it.

    None of ours sets it, so that half of the time is saved; one of the user's own might.
    """
    from hydra._internal.hydra import Hydra

    looks = Hydra.get_mode
    if not (_flag_of_own_configs(args) or any("hydra.mode" in word for word in args)):
        Hydra.get_mode = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.get_mode = looks  # type: ignore[method-assign]


def _hide_secrets_in(file: Path) -> None:
    """Hydra has written the config and the command line of a multirun, tokens and all."""
    from omegaconf import OmegaConf

    if is_main_process() and file.is_file():
        content: Any = OmegaConf.to_container(OmegaConf.load(file))
        shown = without_secrets_of_hydra(content)
        if shown != content:
            write_text(file, OmegaConf.to_yaml(OmegaConf.create(shown)))


def _flag_of_own_configs(args: Sequence[str]) -> str | None:
    return flag(args, "--config-dir", "-cd", "--config-path", "-cp")


def _has_own_folder(cfg: Any, args: Sequence[str]) -> bool:
    """Whether no other job of a multirun has this output folder: nothing else is swept over."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    words = [word for word in args if "=" in word and not word.startswith("-")]
    overrides = OverridesParser.create().parse_overrides(words)
    swept = [override.key_or_group for override in overrides if override.is_sweep_override()]
    named = str(cfg.paths.output_dir).endswith(f"/{cfg.task_name}")
    return swept == ["paths.output_dir"] or (swept == ["task_name"] and named)


def _silence_what_is_handled() -> None:
    """Libraries warn of what this program has seen to; warnings that are left deserve a look."""
    for message in (
        "Model (with|has) `tie_word_embeddings=True`",  # a head is untied before it is merged
        r"`(is_)?gradient_checkpointing",  # renamed in transformers 5; the old name works in both
        "A worker stopped while some jobs",  # between stages, its memory has grown: another starts
    ):
        warnings.filterwarnings("ignore", message=message)


def _leave_talking_to_the_first_process() -> None:
    """All processes of a run would say the same; what is left of the others are their errors."""
    if is_main_process():
        return
    logging.getLogger().setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for library in ("HF_HUB", "HF_DATASETS"):
        os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")


@contextmanager
def _mistakes_in_one_message(command: str) -> Iterator[None]:
    try:
        with system_in_words():
            yield
    except (InputError, GuardError) as error:
        _say(error)
        raise SystemExit(_exit_code(error)) from error
    except KeyboardInterrupt as stopped:
        if is_main_process():
            _say(str(stopped) or f"Stopped by Ctrl-C. {AFTER_CTRL_C.get(command, '')}".rstrip())
        raise SystemExit(128 + signal.SIGINT) from stopped


def _say(error: Exception | str) -> None:
    """One screen of it at most."""
    lines = [
        line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..."
        for line in safe(str(error)).splitlines()
    ]
    more = len(lines) - MOST_LINES
    print("\n".join(lines[:MOST_LINES]), file=sys.stderr)
    if more > 0:
        print(f"... and {more} more like these.", file=sys.stderr)


def _exit_code(error: Exception) -> int:
    """2 for what the user can put right beforehand, 1 for a run that went wrong."""
    return 2 if isinstance(error, InputError) else 1
