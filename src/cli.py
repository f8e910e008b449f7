"""The command ``unlora``, and how every entry script starts.

``launch`` lets Hydra compose a config and hands it to a run function. What users type is accepted
as the documents of this field print it; what they mistype ends in one message and exit code 2.
Nothing heavy is imported here: help and mistakes in a config must not wait for torch.
"""

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module, resources
from itertools import pairwise
from pathlib import Path
from textwrap import fill, indent
from typing import Any

from unlora.errors import GuardError, InputError
from unlora.registry import unknown
from unlora.run import is_main_process

COMMANDS = {
    "train": ("fine-tune a model", "experiment=finetune/tofu/lora task_name=mine"),
    "unlearn": ("make a model forget", "experiment=unlearn/tofu/lora trainer=NPO"),
    "alternates": ("write other answers for AltPO to prefer", "experiment=unlearn/tofu/lora"),
    "eval": ("evaluate a model", "model=saves/unlearn/mine data.forget=my_forget.jsonl"),
    "study": ("run and compare several models", "experiment=study/pocket/lora"),
    "export": ("write a run as one standalone model or adapter", "saves/unlearn/mine --merged"),
    "doctor": ("say what is found on this machine; loads no model", ""),
}
# config name -> the folder of its experiments
EXPERIMENTS = {
    "train": "finetune",
    "unlearn": "unlearn",
    "alternates": "unlearn",
    "eval": "eval",
    "study": "study",
}
VALUED_FLAGS = {
    *("--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd", "--cfg", "-c"),
    *("--package", "-p", "--experimental-rerun"),
}
# of an evaluation: flag -> the key of the config that it sets
SHORT = {"--plan": "++plan=true", "--quiet": "++output=quiet", "--json": "++output=json"}
# files of the user's to evaluate on, and the experiment for them
OWN_DATA = ("data.forget", "data.retain", "data.holdout")
OWN = "eval/own/default"
MODEL_PATH = "model.model_args.pretrained_model_name_or_path"
OVERRIDE = re.compile(r"(\+\+|\+|~|)@?([^=]*)(=.*)?", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``unlora``."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(_overview())
    elif command in EXPERIMENTS:
        module = "unlora.train" if command == "unlearn" else f"unlora.{command}"
        launch(lambda cfg: import_module(module).run(cfg), command, rest)
    else:
        with _mistakes_in_one_message():
            if command not in COMMANDS:
                raise InputError(unknown("command", command, COMMANDS))
            _silence_what_is_handled()
            module = "unlora.doctor" if command == "doctor" else "unlora.model.export"
            import_module(module).main(rest)


def launch(run: Callable[[Any], Any], config_name: str, argv: Sequence[str] | None = None) -> None:
    """Compose the config that the command line asks for, and run with it.

    Args:
        config_name: the config if ``--config-name`` does not name another.
        argv: the command line without the program; that of this process if not given.
    """
    typed = sys.argv[1:] if argv is None else argv
    args = normalised(typed)
    name = (_flag(args, "--config-name", "-cn") or config_name).removesuffix(".yaml")
    if {"-h", "--help"} & set(args):
        print(_help(name, args))
        return
    with _mistakes_in_one_message():
        refuse_broken_stack()
        _refuse_foreign_flags(name, typed)
        _refuse_foreign_experiment(name, args)
        if name == "eval":
            args = _beside_the_result(_with_own_data(args))
        _run_hydra(run, config_name, name, args)


def normalised(argv: Sequence[str]) -> list[str]:
    """The command line as Hydra reads it: flags first, then overrides.

    ``@key=value`` is ``key=value``, and ``group=name.yaml`` is ``group=name``. ``model=PATH`` is
    the config for any model, with an adapter to train for a ``.../lora`` experiment. A value with a
    dotted key is set whether or not the key is there already: the typed sections of the config tell
    keys from typos, and know more keys than the YAML, which holds only those with a default.
    """
    flags, overrides, short, words = [], [], [], iter(argv)
    for word in words:
        if not word.startswith("-"):
            overrides.append(word)
        elif word in SHORT:
            short.append(SHORT[word])
        else:
            flags.append(word)
            if word in VALUED_FLAGS:
                flags += [next(words, "")]
    folders = _config_folders(flags)
    overrides = _with_model_path(overrides, folders)
    return flags + [_override(word, folders) for word in overrides] + short


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


def _override(word: str, folders: Sequence[Path]) -> str:
    match = OVERRIDE.fullmatch(word)
    assert match is not None  # it matches every string
    sign, key, value = match[1], match[2], match[3] or ""
    if key.startswith("hydra") or sign == "~" or not value:
        return sign + key + value
    if any((folder / key.split("@")[0]).is_dir() for folder in folders):
        return sign + key + re.sub(r"\.ya?ml(?=,|$)", "", value)
    file = os.path.expanduser(value[1:])
    if key in OWN_DATA and os.path.isfile(file):
        value = f"={_quoted(file)}"
    return f"++{key}{value}" if sign or "." in key else key + value


def _with_model_path(overrides: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """``model=PATH`` as two overrides: the config for any model, and the path."""
    experiments = [word.partition("=")[2] for word in overrides if "experiment=" in word]
    trains_adapter = any(name.removesuffix(".yaml").endswith("/lora") for name in experiments)
    words = []
    for word in overrides:
        key, _, value = word.removeprefix("@").partition("=")
        paths = [value] if os.path.isdir(os.path.expanduser(value)) else value.split(",")
        if key == "model" and all(_is_model_path(path, folders) for path in paths):
            quoted = ",".join(_quoted(os.path.expanduser(path)) for path in paths)
            words += [f"model=any{'-lora' * trains_adapter}", f"{MODEL_PATH}={quoted}"]
        else:
            words.append(word)
    return words


def _is_model_path(name: str, folders: Sequence[Path]) -> bool:
    """Whether this is a folder, or written like one or like a repository, and is no config."""
    config = f"{re.sub(r'[.]ya?ml$', '', name)}.yaml"
    if any((folder / "model" / config).is_file() for folder in folders):
        return False
    written = ("/" in name or name.startswith("~")) and not re.match(r"['\"]|\w+\(", name)
    return written or os.path.isdir(name)


def _quoted(text: str) -> str:
    """A text as Hydra reads it back, whatever signs are in it."""
    inner = re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    return f"'{inner}'"


def _with_own_data(args: Sequence[str]) -> list[str]:
    """The command line of an evaluation, with the experiment for the user's own data.

    Raises:
        InputError: another experiment is named beside them, or no model.
    """
    given = _given(args)
    experiment = given.get("experiment", OWN)
    own = [key for key in OWN_DATA if key in given]
    if not own:
        return list(args)
    if experiment.startswith("eval/") and not experiment.startswith("eval/own/"):
        raise InputError(
            f"{own[0]} evaluates on your own data, experiment={experiment} on a benchmark. "
            "Give one of them."
        )
    more = [] if "experiment" in given else [f"experiment={OWN}"]
    model = given.get(MODEL_PATH) or given.get("model")
    if more and not model:
        raise InputError(
            "model is missing. Give model=PATH: a run folder, an adapter, a model folder, a "
            "repository of the hub, or a name that `unlora eval --help` lists."
        )
    if more and model and "task_name" not in given and "," not in model:
        more.append(f"task_name='{_named_after(model)}'")
    return [*args, *more]


def _named_after(model: str) -> str:
    """``eval_mine`` for ``saves/unlearn/mine``."""
    path = Path(model.removeprefix("'").removesuffix("'"))
    last = path.name if path.name.strip(".") else path.resolve().name
    if last.startswith("checkpoint-") or last.isdigit():  # of a run, of a multirun
        last = f"{path.resolve().parent.name}_{last}"
    return "eval_" + re.sub(r"[^\w.-]+", "_", last)


def _beside_the_result(args: Sequence[str]) -> list[str]:
    """With messages on stderr where stdout is for the result alone."""
    if _given(args).get("output") not in ("quiet", "json"):
        return list(args)
    return [*args, "hydra.job_logging.handlers.console.stream='ext://sys.stderr'"]


def _given(args: Sequence[str]) -> dict[str, str]:
    """key -> value of the overrides."""
    words = [word.lstrip("+") for word in args if "=" in word and not word.startswith("-")]
    return {key: value for key, _, value in (word.partition("=") for word in words)}


def _run_hydra(run: Callable[[Any], Any], default: str, name: str, args: Sequence[str]) -> None:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    started = False

    def task(cfg: Any) -> Any:
        nonlocal started
        started = True
        _silence_what_is_handled()
        _leave_talking_to_the_first_process()
        settings = HydraConfig.get()
        several = settings.mode == RunMode.MULTIRUN
        if several and not _has_own_folder(cfg, args):  # jobs never share a folder
            OmegaConf.update(cfg, "paths.output_dir", f"{cfg.paths.output_dir}/{settings.job.num}")
        try:
            return run(cfg)
        except (InputError, GuardError) as error:
            _say(error)
            if several:  # the other jobs go on
                raise
            raise SystemExit(_exit_code(error)) from error

    before, sys.argv = sys.argv, [sys.argv[0], *args]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us as they are
    try:
        hydra.main(config_path="pkg://unlora.configs", config_name=default, version_base=None)(
            task
        )()
    except (InputError, GuardError) as error:  # said already
        raise SystemExit(_exit_code(error)) from error
    except OverrideParseException as error:
        raise InputError(_unreadable(error.override.removeprefix("++"))) from error
    except MissingConfigException as error:
        raise InputError(_missing_config(str(error.missing_cfg_file), name, args)) from error
    except (HydraException, OmegaConfBaseException) as error:
        if started:
            raise
        raise InputError(_composition_mistake(str(error), name, args)) from error
    finally:
        sys.argv = before


def _has_own_folder(cfg: Any, args: Sequence[str]) -> bool:
    """Whether no other job of a multirun has this output folder: nothing else is swept over."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    words = [word for word in args if "=" in word and not word.startswith("-")]
    overrides = OverridesParser.create().parse_overrides(words)
    swept = [override.key_or_group for override in overrides if override.is_sweep_override()]
    named = str(cfg.paths.output_dir).endswith(f"/{cfg.task_name}")
    return swept == ["paths.output_dir"] or (swept == ["task_name"] and named)


def _unreadable(override: str) -> str:
    key, _, value = override.partition("=")
    if value and not value.isascii():
        return (
            f"Cannot read {override!r}: text with letters other than a-z must be quoted: "
            f"""{key}='"{value}"'."""
        )
    return (
        f"Cannot read {override!r}. Write key=value, and quote signs that have a meaning: "
        """key='"a, b"'."""
    )


def _silence_what_is_handled() -> None:
    """Libraries warn of what this program has seen to; warnings that are left deserve a look."""
    for message in (
        "Model (with|has) `tie_word_embeddings=True`",  # a head is untied before it is merged
        r"`(is_)?gradient_checkpointing",  # renamed in transformers 5; the old name works in both
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


def _refuse_foreign_flags(name: str, typed: Sequence[str]) -> None:
    """Raises InputError where a flag of the evaluation is given to another command."""
    for word in typed:
        if word in SHORT and name in EXPERIMENTS and name != "eval":
            raise InputError(f"{word} is a flag of `unlora eval`; {name} has no such flag.")


def _refuse_foreign_experiment(name: str, args: Sequence[str]) -> None:
    """Raises InputError where an experiment is given to the config of another."""
    for word in args:
        kind = word.removeprefix("experiment=").split("/")[0]
        owners = [config for config, folder in EXPERIMENTS.items() if folder == kind] or [name]
        if word.startswith("experiment=") and name in EXPERIMENTS and name not in owners:
            owner = owners[0]
            script = owner if owner in ("eval", "study") else "train"
            raise InputError(
                f"{word} does not go with the config {name!r}. "
                f"Use: python src/{script}.py --config-name={owner} {word}"
            )


def _missing_config(path: str, name: str, args: Sequence[str]) -> str:
    """The message for a config file that was named and is not there."""
    group, _, wanted = path.partition("/")
    if not wanted:
        return unknown("config", group.removesuffix(".yaml"), _choices("", name, args))
    inner = f"{group}/{wanted.partition('/')[0]}"
    if group != "experiment" and any((x / inner).is_dir() for x in _config_folders(args)):
        group, wanted = inner, wanted.partition("/")[2]
    more = " Or give a folder, or owner/name on the hub." if group == "model" else ""
    return unknown(group, wanted, _choices(group, name, args)) + more


def _composition_mistake(message: str, name: str, args: Sequence[str]) -> str:
    """What Hydra says in several lines, in one."""
    message = " ".join(message.split())
    if found := re.search(r"You must specify '([\w/]+)'", message):
        choices = ", ".join(_choices(found[1], name, args))
        own = " Or evaluate on your own data: data.forget=FILE." if name == "eval" else ""
        return f"{found[1]} is missing. Give {found[1]}=NAME. Known: {choices}.{own}"
    if found := re.search(r"already at '(.+?)'|Multiple values for (\S+)\.", message):
        key = found[1] or found[2]
        return f"{key} is chosen already. Write {key}=NAME, without the +."
    if found := re.search(r"Could not override '(.+?)'\.", message):
        key, known = found[1], _top_level_keys()
        if "@" in key or "/" in key:
            near = re.search(r"Did you mean (?:to override (?:one of )?)?(.+?)\?", message)
            hint = f" There is: {near[1]}." if near else ""
            return f"The config {name!r} has nothing to choose at {key!r}.{hint}"
        if key in known:
            return f"{key} has no use in this experiment; it would change nothing."
        return unknown("key", key, known)
    if found := re.search(r"Ambiguous value for argument '\+*(.+?)'", message):
        return (
            f"{found[1]!r} holds several values. Runs with each of them need --multirun; a list is "
            "written key=[a,b], and text with a comma key='\"a,b\"'."
        )
    return message


def _top_level_keys() -> list[str]:
    from unlora.config import Config

    return list(Config.model_fields)


def _config_folders(args: Sequence[str]) -> list[Path]:
    own = Path(str(resources.files("unlora.configs")))
    given = _flag(args, "--config-dir", "-cd")
    return [own, Path(given)] if given else [own]


def _choices(group: str, name: str, args: Sequence[str]) -> list[str]:
    """What may stand after ``group=``; of experiments, those of the config ``name``."""
    found = set()
    for folder in _config_folders(args):
        pattern = "**/*.yaml" if group == "experiment" else "*.yaml"
        for file in (folder / group).glob(pattern):
            found.add(file.relative_to(folder / group).with_suffix("").as_posix())
    if group == "experiment":
        others = set(EXPERIMENTS.values()) - {EXPERIMENTS.get(name)}
        found = {choice for choice in found if choice.split("/")[0] not in others}
    return sorted(found)


def _flag(args: Sequence[str], *names: str) -> str | None:
    """The value of a flag, given as ``--flag value`` or ``--flag=value``."""
    for word, following in pairwise([*args, ""]):
        if word in names:
            return following
        if word.split("=")[0] in names:
            return word.partition("=")[2]
    return None


@contextmanager
def _mistakes_in_one_message() -> Iterator[None]:
    try:
        yield
    except (InputError, GuardError) as error:
        _say(error)
        raise SystemExit(_exit_code(error)) from error


def _say(error: Exception) -> None:
    print(error, file=sys.stderr)


def _exit_code(error: Exception) -> int:
    """2 for what the user can put right beforehand, 1 for a run that went wrong."""
    return 2 if isinstance(error, InputError) else 1


def _overview() -> str:
    rows = [f"  {command:12}{what}" for command, (what, _) in COMMANDS.items()]
    examples = [f"  unlora {command} {words}".rstrip() for command, (_, words) in COMMANDS.items()]
    return "\n".join(
        ["usage: unlora COMMAND ...", "", "Unlearning for language models, LoRA first.", ""]
        + [*rows, "", "examples:", *examples, "", "unlora COMMAND --help says more."]
    )


def _help(name: str, args: Sequence[str]) -> str:
    what, example = COMMANDS.get(name, ("run the config " + name, "experiment=..."))
    script = "train" if name == "unlearn" else name
    lines = [
        f"usage: unlora {name} [flags] key=value ...",
        f"       python src/{script}.py --config-name={name} [flags] key=value ...",
        "",
        f"{what[0].upper()}{what[1:]}. Example: unlora {name} {example}",
        "",
    ]
    groups = {
        "study": ["experiment"],
        "eval": ["experiment", "model", "eval"],
        "alternates": ["experiment", "model"],
    }
    for group in groups.get(name, ["experiment", "model", "trainer", "eval"]):
        choices = fill(", ".join(_choices(group, name, args)), 96, break_on_hyphens=False)
        lines += [f"{group}=", indent(choices, "    "), ""]
    of_evaluation = [
        "    model=PATH                        a run folder, an adapter, a model, or owner/name",
        "    data.forget=FILE data.retain=FILE data.holdout=FILE   your own questions and answers:",
        "                                      .jsonl, .json, .csv, .parquet; one file will do",
        "    eval.own.question_key=prompt eval.own.answer_key=reply   their columns",
        "    forget_split=forget10 retain_logs_path=FILE   of a benchmark",
    ]
    of_training = [
        "    model=PATH                        a run folder, an adapter, a model, or owner/name",
        "    model.lora_config.r=32            any key of lora_config",
        "    trainer.args.learning_rate=1e-4   any of transformers' TrainingArguments",
        "    trainer.method_args.beta=0.1      any parameter of the objective",
        "    forget_split=forget10 retain_split=retain90 retain_logs_path=FILE",
    ]
    of_alternates = [
        "    model=PATH                        a run folder, an adapter, a model, or owner/name",
        "    alternates.repeats=5              how many other answers to each question",
        "    alternates.prompt='...'           the request, with {question} and {answer}",
        "    forget_split=forget10",
    ]
    of_output = [
        "    --plan         print what the model would be asked, rows and tokens, and stop",
        "    --quiet        print warnings only, on stderr; the figures are in the run folder",
        "    --json         print the figures as one JSON object and nothing else on stdout",
    ]
    return "\n".join(
        [
            *lines,
            "keys that are often set:",
            "    task_name=NAME                    the run goes to saves/<mode>/<task_name>",
            *{"eval": of_evaluation, "alternates": of_alternates}.get(name, of_training),
            "    paths.datasets_dir=FOLDER         local copies of the hub data sets",
            "",
            "flags:",
            *(of_output if name == "eval" else ()),
            "    --cfg job      print the composed config and stop",
            "    --multirun     several runs: key=a,b runs with a and with b",
            "    --config-dir   a folder of your own with experiment/, model/, ...",
        ]
    )
