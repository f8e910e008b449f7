"""Explain what is wrong with a command line, in one sentence that ends in what to type."""

import re
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

from unlora.cli.overrides import (
    EXPERIMENTS,
    PLAIN_FLAGS,
    SHORT,
    VALUED_FLAGS,
    choices,
    config_folders,
    is_group,
)
from unlora.errors import InputError
from unlora.registry import unknown
from unlora.runs.redaction import without_setting

# what the name of a launcher of Hydra begins with -> its package
LAUNCHERS = {"submitit": "hydra-submitit-launcher", "ray": "hydra-ray-launcher"}
# what a flag of Hydra would do, and what to do instead
REFUSED_FLAGS = {
    "--experimental-rerun": (
        "would have Hydra unpickle a file, which can run code. Repeat a run with the command in "
        "its manifest.json."
    ),
    "--shell-completion": "is Hydra's. Type: unlora completion bash (or zsh, fish)",
    "-sc": "is Hydra's. Type: unlora completion bash (or zsh, fish)",
}
FLAG_VALUES = {
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
FLAG_VALUES |= {"-c": FLAG_VALUES["--cfg"], "-i": FLAG_VALUES["--info"]}
# what people type, and what it is called here
OTHER_WORDS = {
    "finetune": "train",
    "fine-tune": "train",
    "forget": "unlearn",
    "evaluate": "eval",
    "compare": "report",
    "talk": "chat",
    "check": "doctor",
    "merge": "export",
}


def unknown_command(typed: str, known: Iterable[str]) -> str:
    """The message for a command that there is not."""
    typed = without_setting(typed)
    if typed in OTHER_WORDS:
        return f"Unknown command {typed!r}. Type: unlora {OTHER_WORDS[typed]} --help"
    if "=" in typed or typed.startswith("-"):
        return f"The command is missing before {typed!r}. Type: unlora train {typed}, or --help."
    if "/" in typed:
        return f"Unknown command {typed!r}. To talk to a model: unlora chat {typed}"
    return unknown("command", typed, known) + " Type: unlora --help"


def refuse_foreign_flags(name: str, typed: Sequence[str]) -> None:
    """Let no flag through to Hydra but the ones that are known, spelled out.

    Hydra takes the beginning of a flag for the flag, and some of its flags unpickle a file.

    Raises:
        InputError: a flag is unknown, is refused, is one of another command, or lacks its value.
    """
    words = iter(typed)
    for word in words:
        flag, equals, value = word.partition("=")
        owners = SHORT[word][0] if word in SHORT else (name,)
        if not word.startswith("-"):
            continue
        if name in EXPERIMENTS and name not in owners:
            raise InputError(
                f"{word} is a flag of `unlora {owners[0]}`; {name} has no such flag. "
                f"Type: unlora {name} --help"
            )
        if flag in VALUED_FLAGS and not equals:
            value = next(words, "")
        valued = flag in VALUED_FLAGS or (flag in FLAG_VALUES and equals)
        if valued and (not value or value.startswith("-")):
            raise InputError(f"{flag} needs a value. Type: unlora {name} --help")
        if valued and value not in FLAG_VALUES.get(flag, (value,)):
            raise InputError(unknown(f"value of {flag}", value, FLAG_VALUES[flag]))
        if not valued and word not in (*SHORT, *PLAIN_FLAGS):
            raise InputError(unknown_flag(name, flag))


def unknown_flag(name: str, flag: str) -> str:
    """The message for a flag that is not taken; what follows its = may be a secret."""
    for refused, reason in REFUSED_FLAGS.items():
        if flag == refused or (len(flag) > 2 and refused.startswith(flag)):
            return f"{refused} {reason}"
    own = (short for short, (owners, _) in SHORT.items() if name in owners)
    return unknown("flag", flag, (*own, *PLAIN_FLAGS, *VALUED_FLAGS))


def refuse_foreign_experiment(name: str, args: Sequence[str]) -> None:
    """Raises InputError where an experiment is given to the config of another."""
    for word in args:
        kind = word.removeprefix("experiment=").split("/")[0]
        owners = [config for config, folder in EXPERIMENTS.items() if folder == kind] or [name]
        if word.startswith("experiment=") and name in EXPERIMENTS and name not in owners:
            owner = owners[0]
            script = owner if owner in ("eval", "study") else "train"
            raise InputError(
                f"{word} does not go with the config {name!r}. Use: unlora {owner} {word}, "
                f"or: python src/{script}.py --config-name={owner} {word}"
            )


def missing_config(path: str, name: str, args: Sequence[str]) -> str:
    """The message for a config file that was named and is not there."""
    group, _, wanted = path.partition("/")
    if path.startswith("hydra/launcher/"):  # each comes with a package of its own
        launcher = path.rpartition("/")[2]
        package = next((LAUNCHERS[x] for x in LAUNCHERS if launcher.startswith(x)), None)
        if package is None:
            known = ("basic", "joblib", "submitit_slurm", "submitit_local", "ray")
            return unknown("hydra/launcher", launcher, known)
        return f"hydra/launcher={launcher} is not installed. Install it: pip install {package}"
    if not wanted:
        group = group.removesuffix(".yaml")
        if {f"{group}=", f"{group}=''", f'{group}=""'} & set(args):
            return f"{group} is given no name. Known: {', '.join(choices(group, name, args))}."
        configs = choices("", name, args)
        if group in configs:
            return (
                f"There is no {group}.yaml in the folder of --config-path, which takes the place "
                "of all configs of this program. Give your own beside them: --config-dir=FOLDER."
            )
        return unknown("config", group, configs)
    if group == "hydra":
        return f"Hydra has no config {wanted!r} in its group hydra. Leave it out."
    inner = f"{group}/{wanted.partition('/')[0]}"
    if group != "experiment" and is_group(inner, config_folders(args)):
        group, wanted = inner, wanted.partition("/")[2]
    more = " Or give a folder, or owner/name on the hub." if group == "model" else ""
    return unknown(group, wanted, choices(group, name, args)) + more


def composition_mistake(message: str, name: str, args: Sequence[str], cause: str = "") -> str:
    """What Hydra says in several lines, in one.

    Args:
        cause: what was wrong with the value, where Hydra was told.
    """
    message = " ".join(message.split())
    if match := re.search(r"You must specify '([\w/]+)'", message):
        known = choices(match[1], name, args)
        own = " Or evaluate on your own data: data.forget=FILE." if name == "eval" else ""
        return f"{match[1]} is missing. Give {match[1]}=NAME. Known: {', '.join(known)}.{own}"
    if match := re.search(r"Missing mandatory value: ([\w.]+)", message):  # of a multirun
        if match[1] == "task_name" and not any("experiment=" in word for word in args):
            return composition_mistake("You must specify 'experiment'", name, args)
        return f"{match[1]} has no value. Give {match[1]}=..."
    if match := re.search(r"already at '(.+?)'|Multiple values for (\S+)\.", message):
        key = match[1] or match[2]
        return f"{key} is chosen already. Write {key}=NAME, without the +."
    if match := re.search(r"Could not override '(.+?)'\.", message):
        key, known = match[1], _top_level_keys(name)
        if "@" in key or "/" in key:
            near = re.search(r"Did you mean (?:to override (?:one of )?)?(.+?)\?", message)
            hint = f" There is: {near[1]}." if near else ""
            return f"The config {name!r} has nothing to choose at {key!r}.{hint}"
        if key.startswith("hydra"):
            return f"Hydra has no setting {key}. Leave it out, or write it with a + in front."
        meant = f" Did you mean {inner}?" if (inner := _inner_key(key, name)) else ""
        if key in known:
            return f"{key} has no use in this experiment; it would change nothing.{meant}"
        return unknown("key", key, known) + meant
    if "Config group override must be" in message:
        typed = " ".join(without_setting(word) for word in args if "=" in word)
        return (
            "A group of configs is given no name. Write group=NAME or group=[A,B], or ~group to "
            f"leave it out. Given: {typed}."
        )
    if match := re.search(r"Ambiguous value for argument '\+*(.+?)'", message):
        key = match[1].partition("=")[0]
        return (
            f"{key} holds several values. Runs with each of them need --multirun; a list is "
            "written key=[a,b], and text with a comma key='\"a,b\"'."
        )
    if match := re.search(r"Error merging override \+*([\w./@]+)=(.*)", message):
        if cause and "erge" not in cause:
            return f"{without_setting(match[0][23:])}: {cause.splitlines()[0]}."
        return (
            f"{match[1]} is a section with keys, and cannot be {without_setting(match[2])!r}. Set "
            f"each: {match[1]}.NAME=value."
        )
    if match := re.search(r"int\(\) with base 10: '(.+)'|Index '(.+)' \(str\) is not an", message):
        key = re.escape(match[1] or match[2])
        words = (re.match(rf"\+*([\w.]+?)\.({key}\b.*)", word) for word in args)
        if word := next(filter(None, words), None):
            typed, setting = without_setting(word[0]), without_setting(word[2])
            return (
                f"{word[1]} is a list of settings, so {typed} cannot be set from here. Write "
                f"{word[1]}: [..., {setting}] in a config of your own (--config-dir)."
            )
    return (
        without_setting(message)
        or "Hydra cannot make a config of this command line. Type --help for examples."
    )


def _inner_key(key: str, name: str) -> str | None:
    """The key of a section of a training that somebody types without the section."""
    from unlora.config.schema import AlternatesKeys, LoraKeys, TrainerArgs

    sections: dict[str, Any] = {"trainer.args": TrainerArgs, "model.lora_config": LoraKeys}
    if name == "alternates":
        sections = {"alternates": AlternatesKeys}
    elif name not in EXPERIMENTS or name in ("eval", "study"):
        return None
    return next((f"{s}.{key}" for s, keys in sections.items() if key in keys.__annotations__), None)


def unreadable(override: str) -> str:
    """The message for an override that Hydra cannot parse."""
    override = without_setting(override)
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


def _top_level_keys(name: str) -> list[str]:
    if name in ("study", "audit"):
        text = resources.files("unlora.configs").joinpath(f"{name}.yaml").read_text("utf-8")
        return [key for key in re.findall(r"^(\w+):", text, re.MULTILINE) if key != "defaults"]
    from unlora.config.schema import Config

    return list(Config.model_fields)
