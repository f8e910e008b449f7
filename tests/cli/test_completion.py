"""The shell offers what could be typed, without waiting."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unlora.cli.completion import SCRIPTS, words
from unlora.cli.help import COMMANDS
from unlora.cli.main import main
from unlora.cli.overrides import EXPERIMENTS


def test_commands_come_first():
    assert words("unlora ") == sorted(COMMANDS)
    assert words("unlora un") == ["unlearn"]


@pytest.mark.parametrize(
    "line, offered",
    [
        ("unlora unlearn exp", ["experiment="]),
        ("unlora unlearn @exp", ["@experiment="]),
        ("unlora unlearn experiment=unlearn/wmdp/", ["unlearn/wmdp/default", "unlearn/wmdp/lora"]),
        ("unlora train experiment=unlearn/", []),
        ("unlora doctor experiment=unlearn/wmdp/l", ["unlearn/wmdp/lora"]),
        ("unlora train --config-name unlearn experiment=unlearn/wmdp/l", ["unlearn/wmdp/lora"]),
        ("unlora unlearn trainer=SimN", ["SimNPO", "SimNPO_upstream"]),
        ("unlora eval eval=mu", ["muse"]),
        ("unlora unlearn model=pocket", ["pocket", "pocket-lora"]),
        ("unlora unlearn model=saves/", []),
        ("unlora unlearn +data/datasets@data.retain=MUSE_ret", ["MUSE_retain"]),
        ("unlora study --d", ["--dry-run"]),
        ("unlora eval --p", ["--plan"]),
        ("unlora unlearn --p", ["--plan"]),
        ("unlora alternates --p", []),
        ("unlora chat --max", ["--max-new-tokens"]),
        ("unlora chat saves/", []),
        ("unlora completion ", ["bash", "fish", "zsh"]),
    ],
)
def test_what_could_be_typed_is_offered(line, offered):
    found = [word.rpartition("=")[2] or word for word in words(line)]
    assert [word for word in found if not word.startswith("MUSE_retain_")] == offered


def test_every_experiment_is_offered_by_its_command():
    for command, folder in EXPERIMENTS.items():
        found = words(f"unlora {command} experiment=")
        assert found and all(word.startswith(f"experiment={folder}/") for word in found)


def test_own_configs_are_offered(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("")
    line = f"unlora train --config-dir {tmp_path} model=mi"
    assert words(line) == ["model=mine"]


@pytest.mark.parametrize("typed", [[], ["tcsh"], ["bash", "zsh"]])
def test_another_shell_is_one_sentence(typed, capsys):
    with pytest.raises(SystemExit) as left:
        main(["completion", *typed])
    assert left.value.code == 2
    assert "Type: unlora completion bash" in capsys.readouterr().err


def environment(folder: Path) -> dict[str, str]:
    """With the program of this environment first in the path."""
    program = folder / "unlora"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m unlora "$@"\n')
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder)}


BASH = """
eval "$(unlora completion bash)"
for line in "unlora un" "unlora unlearn trainer=NP" "unlora study --dr" "unlora chat sa"; do
    COMP_LINE="$line"; COMP_POINT=${#line}; COMP_WORDS=($line); COMP_CWORD=$((${#COMP_WORDS[@]}-1))
    COMPREPLY=(none); _unlora unlora; echo "${COMPREPLY[*]}"
done
"""
ZSH = """
eval "$(unlora completion zsh 2>/dev/null)" 2>/dev/null
compadd() { [[ "$1" == "-S" ]] && shift 2; shift; print -r -- "$@" }
_files() { print files; }; compset() { }
for LBUFFER in "unlora un" "unlora unlearn trainer=NP" "unlora chat sa"; do _unlora; done
"""
FISH = """
unlora completion fish | source
for line in "unlora un" "unlora unlearn trainer=NP"; complete -C $line; end
"""


@pytest.mark.slow
def test_bash_completes_with_the_real_function(tmp_path):
    done = subprocess.run(
        ["bash", "-c", BASH], env=environment(tmp_path), capture_output=True, text=True
    )
    # bash takes what follows = as the word; nothing is left to files
    assert done.stdout.splitlines() == ["unlearn", "NPO", "--dry-run", ""], done.stderr


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh here")
def test_zsh_completes_with_the_real_function(tmp_path):
    done = subprocess.run(
        ["zsh", "-f", "-c", ZSH], env=environment(tmp_path), capture_output=True, text=True
    )
    said = [line for line in done.stdout.splitlines() if line.strip()]
    assert said == ["unlearn", "trainer=NPO", "files"], done.stderr


@pytest.mark.skipif(not shutil.which("fish"), reason="no fish here")
def test_fish_completes_with_the_real_function(tmp_path):
    done = subprocess.run(
        ["fish", "--no-config", "-c", FISH], env=environment(tmp_path), capture_output=True,
        text=True,
    )  # fmt: skip
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == ["unlearn", "trainer=NPO"]


@pytest.mark.parametrize("shell", SCRIPTS)
def test_scripts_are_printed(shell, capsys):
    main(["completion", shell])
    assert "unlora completion --words" in capsys.readouterr().out


def test_an_answer_loads_no_library(tmp_path):
    code = (
        "import sys; from unlora.cli.main import main\n"
        "main(['completion', '--words', 'unlora unlearn trainer=NP'])\n"
        "heavy = {'torch', 'transformers', 'hydra', 'omegaconf', 'pydantic'}\n"
        "print(sorted(heavy & {*sys.modules}))"
    )
    before, started = os.times(), time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "trainer=NPO\n[]\n"
    # 0.1 s on an idle core; several times as much where the cores are shared
    assert os.times().children_user - before.children_user < 0.5
    assert time.monotonic() - started < 20
