"""Normalise what users type to what Hydra reads.

Commands are typed as the documents of this field print them: with ``@``, with ``.yaml``, with a
path for a model. Nothing heavy is imported here, and nothing is read but the names of configs.
"""

import os
import re
from collections.abc import Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path

from unlora.errors import InputError

# config name -> the folder of its experiments
EXPERIMENTS = {
    "train": "finetune",
    "unlearn": "unlearn",
    "alternates": "unlearn",
    "eval": "eval",
    "study": "study",
}
# the flags of Hydra that are taken; what else it has reads, unpickles or runs something
VALUED_FLAGS = {
    *("--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd", "--cfg", "-c"),
    *("--package", "-p"),
}
INFO = ("--info", "-i")
PLAIN_FLAGS = {
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m"),
    *INFO,
}
# flag of some commands -> those, and the key of their config that it sets
SHORT = {
    "--plan": (("eval", "train", "unlearn"), "++plan=true"),
    "--quiet": (("eval",), "++output=quiet"),
    "--json": (("eval",), "++output=json"),
    "--dry-run": (("study",), "++dry_run=true"),
}
# files of the user's to evaluate on, and the experiment for them
OWN_DATA = ("data.forget", "data.retain", "data.holdout")
OWN = "eval/own/default"
MODEL_PATH = "model.model_args.pretrained_model_name_or_path"
WITHOUT_EVALUATION = re.compile(r"~@?eval|(\+\+|\+)?@?eval=(null|none|false|)", re.IGNORECASE)
OVERRIDE = re.compile(r"(\+\+|\+|~|)@?([^=]*)(=.*)?", re.DOTALL)


def normalised(argv: Sequence[str]) -> list[str]:
    """The command line as Hydra reads it: flags first, then overrides.

    ``@key=value`` is ``key=value``, and ``group=name.yaml`` is ``group=name``. ``model=PATH`` is
    the config for any model, with an adapter to train for a ``.../lora`` or ``.../qlora``
    experiment. A value with a dotted key is set whether or not the key is there already: the typed
    sections of the config tell keys from typos, and know more keys than the YAML, which holds only
    those with a default.
    ``~eval`` and ``eval=null`` leave out whatever evaluation an experiment has. ``--info`` takes
    the word that follows, but no override.
    """
    flags, overrides, short, words = [], [], [], [*argv]
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            overrides.append(word)
        elif word in SHORT:
            short.append(SHORT[word][1])
        elif word in INFO:
            named = bool(words) and re.fullmatch(r"\w[\w-]*", words[0])
            flags.append(f"--info={words.pop(0) if named else 'all'}")
        else:
            flags.append(word)
            if word in VALUED_FLAGS:
                flags.append(words.pop(0) if words else "")
    folders = config_folders(flags)
    overrides = _with_model_path(overrides, folders)
    return flags + [_override(word, folders) for word in overrides] + short


def config_folders(args: Sequence[str]) -> list[Path]:
    """Our own folder of configs, then the one of ``--config-dir``."""
    own = Path(str(resources.files("unlora.configs")))
    folder = flag(args, "--config-dir", "-cd")
    return [own, Path(folder)] if folder else [own]


def choices(group: str, name: str, args: Sequence[str]) -> list[str]:
    """What may stand after ``group=``; of experiments, those of the config ``name``."""
    names = set()
    for folder in config_folders(args):
        pattern = "**/*.yaml" if group == "experiment" else "*.yaml"
        for file in (folder / group).glob(pattern):
            names.add(file.relative_to(folder / group).with_suffix("").as_posix())
        if (file := _file_of_metrics(group, folder)).is_file():
            names |= set(re.findall(r"^  (\w+):", file.read_text("utf-8"), re.MULTILINE))
    if group == "experiment":
        others = set(EXPERIMENTS.values()) - {EXPERIMENTS.get(name)}
        names = {choice for choice in names if choice.split("/")[0] not in others}
    return sorted(names)


def is_group(name: str, folders: Sequence[Path]) -> bool:
    """Whether this is a group of configs, in one of these folders."""
    return any(
        (folder / name).is_dir() or _file_of_metrics(name, folder).is_file() for folder in folders
    )


def _file_of_metrics(group: str, folder: Path) -> Path:
    """The file with the options of ``eval/SUITE_metrics``, see ``unlora.config.metrics``."""
    suite = re.fullmatch(r"eval/(\w+)_metrics", group)
    return folder / "metrics" / f"{suite[1] if suite else ''}.yaml"


def flag(args: Sequence[str], *names: str) -> str | None:
    """The value of a flag, given as ``--flag value`` or ``--flag=value``."""
    for word, following in pairwise([*args, ""]):
        if word in names:
            return following
        if word.split("=")[0] in names:
            return word.partition("=")[2]
    return None


def given(args: Sequence[str]) -> dict[str, str]:
    """key -> value of the overrides."""
    words = [word.lstrip("+") for word in args if "=" in word and not word.startswith("-")]
    return {key: value for key, _, value in (word.partition("=") for word in words)}


def with_own_data(args: Sequence[str]) -> list[str]:
    """The command line of an evaluation, with the experiment for the user's own data.

    Raises:
        InputError: another experiment is named beside them, or no model.
    """
    typed = given(args)
    experiment = typed.get("experiment", OWN)
    own = [key for key in OWN_DATA if key in typed]
    if not own:
        return list(args)
    if experiment.startswith("eval/") and not experiment.startswith("eval/own/"):
        raise InputError(
            f"{own[0]} evaluates on your own data, experiment={experiment} on a benchmark. "
            "Give one of them."
        )
    more = [] if "experiment" in typed else [f"experiment={OWN}"]
    model = typed.get(MODEL_PATH) or typed.get("model")
    if more and not model:
        raise InputError(
            "model is missing. Give model=PATH: a run folder, an adapter, a model folder, a "
            "repository of the hub, or a name that `unlora eval --help` lists."
        )
    if more and model and "task_name" not in typed and "," not in model:
        more.append(f"task_name='{named_after(model)}'")
    return [*args, *more]


def named_after(model: str) -> str:
    """``eval_mine`` for ``saves/unlearn/mine``."""
    path = Path(model.removeprefix("'").removesuffix("'"))
    last = path.name if path.name.strip(".") else path.resolve().name
    if last.startswith("checkpoint-") or last.isdigit():  # of a run, of a multirun
        last = f"{path.resolve().parent.name}_{last}"
    return "eval_" + re.sub(r"[^\w.-]+", "_", last)


def beside_the_result(args: Sequence[str]) -> list[str]:
    """With messages on stderr where stdout is for the result alone."""
    if given(args).get("output") not in ("quiet", "json"):
        return list(args)
    return [*args, "hydra.job_logging.handlers.console.stream='ext://sys.stderr'"]


def _override(word: str, folders: Sequence[Path]) -> str:
    match = OVERRIDE.fullmatch(word)
    assert match is not None  # it matches every string
    if WITHOUT_EVALUATION.fullmatch(word):
        return "++evaluate=false"
    sign, key, value = match[1], match[2], match[3] or ""
    if key.startswith("hydra") or sign == "~" or not value:
        return sign + key + value
    if is_group(key.split("@")[0], folders):
        return sign + key + re.sub(r"\.ya?ml(?=,|$)", "", value)
    path = os.path.expanduser(value[1:])
    is_own_data = key in (*OWN_DATA, "data.train") and os.path.exists(path)
    if is_own_data or re.match("=~(/|$)", value):  # no shell looks behind the =
        value = f"={quoted(path)}"
    elif key == "task_name":
        names = (quoted(x) if is_number(x) else x for x in value[1:].split(","))
        value = "=" + ",".join(names)
    return f"++{key}{value}" if sign or "." in key else key + value


def _with_model_path(overrides: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """``model=PATH`` as two overrides: the config for any model, and the path; of a study, one."""
    experiments = [word.partition("=")[2] for word in overrides if "experiment=" in word]
    of_study = any(name.startswith("study/") for name in experiments)
    trains_adapter = any(
        name.removesuffix(".yaml").rpartition("/")[2] in ("lora", "qlora") for name in experiments
    )
    words = []
    for word in overrides:
        key, _, value = word.removeprefix("@").partition("=")
        paths = [value] if os.path.isdir(os.path.expanduser(value)) else value.split(",")
        if key == "model" and of_study:  # its lists say what is made of it
            path = os.path.expanduser(value)
            words.append(f"++model.path={quoted(path) if os.path.exists(path) else path}")
        elif key == "model" and all(_is_model_path(path, folders) for path in paths):
            values = ",".join(quoted(os.path.expanduser(path)) for path in paths)
            words += [f"model=any{'-lora' * trains_adapter}", f"{MODEL_PATH}={values}"]
        else:
            words.append(word)
    return words


def _is_model_path(name: str, folders: Sequence[Path]) -> bool:
    """Whether this is a folder, or written like one, a GGUF file or a repository, and no config."""
    config = f"{re.sub(r'[.]ya?ml$', '', name)}.yaml"
    if any((folder / "model" / config).is_file() for folder in folders):
        return False
    written = ("/" in name or name.startswith("~")) and not re.match(r"['\"]|\w+\(", name)
    return written or os.path.isdir(name) or name.lower().endswith(".gguf")


def is_number(text: str) -> bool:
    """Whether Hydra would read an unquoted text as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def quoted(text: str) -> str:
    """A text as Hydra reads it back, whatever signs are in it."""
    inner = re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    return f"'{inner}'"
