"""Complete words in a shell: ``unlora completion SHELL`` prints the script for it.

An answer is needed at every press of a key, so nothing is imported but the names of configs. Words
that a folder or a file may stand in for are answered by nothing, and the shell completes files.
"""

from collections.abc import Iterator, Sequence

from unlora.cli.help import COMMANDS
from unlora.cli.overrides import EXPERIMENTS, SHORT, choices, flag
from unlora.errors import InputError

FLAGS = ("--help", "--cfg", "--multirun", "--config-dir", "--config-name")
FLAGS_OF = {
    "chat": ("--help", "--temperature", "--max-new-tokens", "--seed"),
    "export": (
        *("--help", "--merged", "--adapter", "--serve", "--rank", "--llama-cpp", "--output"),
        *("--dtype", "--base"),
    ),
    "push": ("--help", "--form", "--private", "--dry-run"),
    "forget": (
        *("--help", "--model", "--where", "--retain", "--route", "--method", "--dial", "--id"),
        *("--exact-up-to", "--dry-run", "--keep-rows", "--question-key", "--answer-key"),
    ),
    "verify": ("--help", "--with-model"),
    "doctor": ("--help", "--config-name", "--config-dir"),
    "report": ("--help",),
    "who-saw": ("--help", "--json", "--question-key", "--answer-key", "--text-key"),
    "completion": ("--help",),
}
GROUPS = ("experiment", "model", "trainer", "eval", "plugin", "template")
KEYS = (
    *("task_name=", "forget_split=", "retain_split=", "retain_logs_path=", "paths.output_dir="),
    *("paths.datasets_dir=", "model.lora_config.r=", "model.lora_config.lora_alpha="),
    *("trainer.args.learning_rate=", "trainer.args.num_train_epochs=", "trainer.args.seed="),
    *("trainer.args.per_device_train_batch_size=", "trainer.method_args.", "data.forget="),
    "global_batch_size=",
)
# COMP_WORDBREAKS has = in bash, so that a word is what follows it; zsh and fish take it whole
SCRIPTS = {
    "bash": """\
_unlora() {
    local line="${COMP_LINE:0:COMP_POINT}" word found IFS=$'\\n'
    word="${line##*[[:space:]]}"
    found=$(unlora completion --words "$line" 2>/dev/null)
    if [[ -z "$found" ]]; then
        compopt -o default 2>/dev/null
        COMPREPLY=()
        return
    fi
    local cut=""
    [[ "$COMP_WORDBREAKS" == *"="* && "$word" == *"="* ]] && cut="${word%"${word##*=}"}"
    COMPREPLY=($(compgen -W "$found" -- "$word"))
    COMPREPLY=("${COMPREPLY[@]#"$cut"}")
    [[ ${#COMPREPLY[@]} == 1 && "${COMPREPLY[0]}" == *[=/.] ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -F _unlora unlora
""",
    "zsh": """\
#compdef unlora
_unlora() {
    local -a found plain open
    found=("${(@f)$(unlora completion --words "$LBUFFER" 2>/dev/null)}")
    if [[ -z "${found[*]}" ]]; then
        compset -P '*='
        _files
        return
    fi
    open=(${(M)found:#*[=.]})
    plain=(${found:#*[=.]})
    compadd -- $plain
    compadd -S '' -- $open
}
if [[ "$funcstack[1]" == "_unlora" ]]; then _unlora; else compdef _unlora unlora; fi
""",
    "fish": """\
complete -c unlora -f -a '(
    set -l found (unlora completion --words (commandline -cp) 2>/dev/null)
    if test (count $found) -gt 0
        string join \\n -- $found
    else
        __fish_complete_path (commandline -ct | string replace -r ".*=" "")
    end
)'
""",
}


def main(argv: Sequence[str]) -> None:
    """Print the script of a shell, or the words that could stand at the end of a line.

    Raises:
        InputError: there is no script for that shell.
    """
    if argv[:1] == ["--words"]:
        print("\n".join(words(" ".join(argv[1:]))))
    elif len(argv) != 1 or argv[0] not in SCRIPTS:
        shell = f" {' '.join(argv)!r}" if argv else ""
        raise InputError(
            f"No completion for{shell or ' no shell'}. Type: unlora completion bash (or zsh, fish)"
        )
    else:
        print(SCRIPTS[argv[0]], end="")


def words(line: str) -> list[str]:
    """What could stand in place of the last word of a command line; nothing where a file could.

    Args:
        line: up to the cursor, ``unlora`` first.
    """
    _, *typed = line.split() or [""]
    last = "" if line[-1:].isspace() or not typed else typed.pop()
    return sorted({word for word in _possible(typed, last) if word.startswith(last)})


def _possible(typed: Sequence[str], last: str) -> Iterator[str]:
    if not typed:
        yield from COMMANDS
        return
    command, before = typed[0], typed[-1]
    if command == "completion":
        yield from SCRIPTS
    if last.startswith("-"):
        yield from FLAGS_OF.get(command, FLAGS)
        yield from (short for short, (owners, _) in SHORT.items() if command in owners)
        return
    if command not in (*EXPERIMENTS, "doctor") or before in ("--config-dir", "-cd"):
        return
    if before in ("--config-name", "-cn"):
        yield from EXPERIMENTS
        return
    name = (flag(typed, "--config-name", "-cn") or command).removesuffix(".yaml")
    key, equals, _ = last.partition("=")
    sign = last[: len(last) - len(last.lstrip("@+"))]
    if not equals:
        yield from (f"{sign}{key}" for key in (*(f"{group}=" for group in GROUPS), *KEYS))
        return
    group = key.lstrip("@+")
    if group in GROUPS or "/" in group:
        configs = ("train", "unlearn") if name == "doctor" else (name,)
        for config in configs:
            yield from (f"{key}={x}" for x in choices(group.split("@")[0], config, typed))
