"""What is wrong with a command line, in one sentence that ends in what to type."""

import re
from collections.abc import Iterable, Sequence
from importlib import resources

from unlora.commandline import EXPERIMENTS, SHORT, choices, config_folders
from unlora.errors import InputError
from unlora.registry import unknown

# what the name of a launcher of Hydra begins with -> its package
LAUNCHERS = {"submitit": "hydra-submitit-launcher", "ray": "hydra-ray-launcher"}
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
    if typed in OTHER_WORDS:
        return f"Unknown command {typed!r}. Type: unlora {OTHER_WORDS[typed]} --help"
    if "=" in typed or typed.startswith("-"):
        return f"The command is missing before {typed!r}. Type: unlora train {typed}, or --help."
    if "/" in typed:
        return f"Unknown command {typed!r}. To talk to a model: unlora chat {typed}"
    return unknown("command", typed, known) + " Type: unlora --help"


def refuse_foreign_flags(name: str, typed: Sequence[str]) -> None:
    """Raises InputError where a flag of one command is given to another."""
    for word in typed:
        owners = SHORT[word][0] if word in SHORT else (name,)
        if name in EXPERIMENTS and name not in owners:
            raise InputError(
                f"{word} is a flag of `unlora {owners[0]}`; {name} has no such flag. "
                f"Type: unlora {name} --help"
            )


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
        return unknown("config", group.removesuffix(".yaml"), choices("", name, args))
    inner = f"{group}/{wanted.partition('/')[0]}"
    if group != "experiment" and any((x / inner).is_dir() for x in config_folders(args)):
        group, wanted = inner, wanted.partition("/")[2]
    more = " Or give a folder, or owner/name on the hub." if group == "model" else ""
    return unknown(group, wanted, choices(group, name, args)) + more


def composition_mistake(message: str, name: str, args: Sequence[str]) -> str:
    """What Hydra says in several lines, in one."""
    message = " ".join(message.split())
    if found := re.search(r"You must specify '([\w/]+)'", message):
        known = choices(found[1], name, args)
        own = " Or evaluate on your own data: data.forget=FILE." if name == "eval" else ""
        return f"{found[1]} is missing. Give {found[1]}=NAME. Known: {', '.join(known)}.{own}"
    if found := re.search(r"already at '(.+?)'|Multiple values for (\S+)\.", message):
        key = found[1] or found[2]
        return f"{key} is chosen already. Write {key}=NAME, without the +."
    if found := re.search(r"Could not override '(.+?)'\.", message):
        key, known = found[1], _top_level_keys(name)
        if "@" in key or "/" in key:
            near = re.search(r"Did you mean (?:to override (?:one of )?)?(.+?)\?", message)
            hint = f" There is: {near[1]}." if near else ""
            return f"The config {name!r} has nothing to choose at {key!r}.{hint}"
        if key in known:
            return f"{key} has no use in this experiment; it would change nothing."
        return unknown("key", key, known)
    if "Config group override must be" in message:
        return (
            "A group of configs is given no name. Write group=NAME or group=[A,B], or ~group to "
            f"leave it out. Given: {' '.join(word for word in args if '=' in word)}."
        )
    if found := re.search(r"Ambiguous value for argument '\+*(.+?)'", message):
        return (
            f"{found[1]!r} holds several values. Runs with each of them need --multirun; a list is "
            "written key=[a,b], and text with a comma key='\"a,b\"'."
        )
    if found := re.search(r"int\(\) with base 10: '(.+)'|Index '(.+)' \(str\) is not an", message):
        key = re.escape(found[1] or found[2])
        words = (re.match(rf"\+*([\w.]+?)\.({key}\b.*)", word) for word in args)
        if word := next(filter(None, words), None):
            return (
                f"{word[1]} is a list of settings, so {word[0]} cannot be set from here. Write "
                f"{word[1]}: [..., {word[2]}] in a config of your own (--config-dir)."
            )
    return message


def unreadable(override: str) -> str:
    """The message for an override that Hydra cannot parse."""
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
    if name == "study":
        text = resources.files("unlora.configs").joinpath("study.yaml").read_text("utf-8")
        return [key for key in re.findall(r"^(\w+):", text, re.MULTILINE) if key != "defaults"]
    from unlora.config import Config

    return list(Config.model_fields)
