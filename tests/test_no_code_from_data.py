"""Nothing that is read is run: not the files, the configs, the task folders of someone else."""

import ast
import functools
import json
import re
import sys
from collections.abc import Container
from pathlib import Path

import pytest
import yaml

from unlora.cli import hydra_checks, main
from unlora.cli.compose import composed
from unlora.config import read
from unlora.config.resolve import plain, section_as_written
from unlora.errors import InputError

SRC = Path(__file__).parents[1] / "src"
LORA = "experiment=unlearn/pocket/lora"
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "breakpoint", "runpy.run_path",
    # a shell
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
    # pickles, and what reads them
    "pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads",
    "dill.load", "dill.loads", "joblib.load", "marshal.loads", "shelve.open", "pandas.read_pickle",
    "torch.load", "torch.jit.load",
    # YAML that makes objects
    "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    # what a config names
    "hydra.utils.instantiate", "hydra.utils.call", "hydra.utils.get_method",
    "hydra.utils.get_class",
    # members of archives can leave the folder
    "tarfile.open", "shutil.unpack_archive", "zipfile.ZipFile",
}  # fmt: skip
# calls of a function that may import what a name says, with what they are given
IMPORTS = {
    "main.py": {
        "'importlib.metadata'",
        "module",
        "f\"unlora.cli.{command.replace('-', '_')}\"",
    },
    "chat.py": {"'readline'"},
    "doctor.py": {"'torch'"},
    "quantised.py": {"PACKAGE", "f'{PACKAGE}.nn'"},
    "registry.py": {"self.package", "f'{self.package}.{module.name}'"},
}
FILES = sorted(SRC.rglob("*.py"))


def names_of(tree: ast.AST) -> dict[str, str]:
    """Local name -> what was imported under it."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.asname or a.name: a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return found


@functools.cache
def called(text: str) -> list[tuple[str, ast.Call]]:
    """Every call in a module, by the full name of what is called."""
    tree = ast.parse(text)
    known = names_of(tree)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = []
    for call in calls:
        first, dot, rest = ast.unparse(call.func).partition(".")
        found.append((known.get(first, first) + dot + rest, call))
    return found


def wrong_in(text: str, allowed: Container[str] = ()) -> list[str]:
    wrong = []
    for name, call in called(text):
        given = {word.arg: word.value for word in call.keywords}
        shell = given.get("shell")
        if name in FORBIDDEN and name not in allowed:
            wrong.append(name)
        if shell is not None and not (isinstance(shell, ast.Constant) and shell.value is False):
            wrong.append(f"{name} with shell")
        if name == "numpy.load" and ast.unparse(given.get("allow_pickle", call)) != "False":
            wrong.append("numpy.load without allow_pickle=False")
        if name.endswith(".from_pretrained") and name.startswith("transformers.Auto"):
            words = {*given} | ({"**"} if None in given else set())
            if not words & {"**", "trust_remote_code"}:
                wrong.append(f"{name} without trust_remote_code")
    return wrong


def test_no_code_of_ours_runs_what_it_reads():
    allowed = {"packaged.py": {"zipfile.ZipFile"}}  # one member, of a wheel whose hash is ours
    assert not {
        file: wrong
        for file in FILES
        if (wrong := wrong_in(file.read_text("utf-8"), allowed.get(file.name, ())))
    }


@pytest.mark.parametrize(
    "text",
    ["eval(x)", "import os\nos.system(x)", "from os import system as s\ns(x)",
     "import torch as t\nt.load(x)", "from yaml import load\nload(x)",
     "import subprocess as p\np.run(x, shell=True)", "import numpy as np\nnp.load(x)",
     "from transformers import AutoConfig as A\nA.from_pretrained(x)",
     "from pickle import loads\nloads(x)", "from hydra.utils import instantiate\ninstantiate(x)"],
)  # fmt: skip
def test_the_rule_sees_what_it_forbids(text):
    assert wrong_in(text)


def test_modules_are_imported_by_names_of_ours_alone():
    for file in FILES:
        for name, call in called(file.read_text("utf-8")):
            if name == "importlib.import_module":
                module = ast.unparse(call.args[0])
                is_ours = re.fullmatch(r"'unlora\.[a-z_.]+'", module)
                assert is_ours or module in IMPORTS.get(file.name, set()), f"{file}: {module}"


def test_a_process_is_started_with_words_that_are_known():
    words = {
        (file.name, ast.unparse(call.args[0]))
        for file in FILES
        for name, call in called(file.read_text("utf-8"))
        if name.startswith("subprocess.")
    }
    assert words == {
        ("machine.py", "['git', 'rev-parse', 'HEAD']"),
        ("gguf_export.py", "command"),  # Python, a converter of the user's own, paths; no shell
        ("packaged.py", "[*command, '-r', str(needed)]"),  # pip, a package of ours by its hash
    }


# --- configs -------------------------------------------------------------------------------------


@pytest.fixture
def own_configs(tmp_path, monkeypatch):
    """Writes a config from elsewhere; ``unlora unlearn`` composes it, and nothing is trained."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs"
    (folder / "plugin").mkdir(parents=True)

    def write(**content):
        text = "# @package _global_\n" + yaml.safe_dump(content)
        (folder / "plugin" / "theirs.yaml").write_text(text)
        said = []
        words = ["--config-dir", str(folder), LORA, "+plugin=theirs", "task_name=x"]
        main.launch(lambda cfg: said.append(read(cfg)), "unlearn", words)
        return said

    return write


def refused(write, capsys, **content):
    with pytest.raises(SystemExit) as ended:
        write(**content)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in said, said
    return said


TOUCH = {"_target_": "pathlib.Path.touch", "_args_": ["bait"]}


CALLED = [
    {"callbacks": {"mine": TOUCH}},
    {"job_logging": {"handlers": {"mine": {"()": "pathlib.Path", "x": "bait"}}}},
    {"hydra_logging": {"handlers": {"mine": {"class": "os.system", "x": "touch bait"}}}},
]


@pytest.mark.default_cases(2)
@pytest.mark.parametrize(
    "hydra",
    [
        *CALLED,
        {"callbacks": {"mine": {"_target_": "os.system", "_args_": ["touch bait"]}}},
        {"launcher": {"_target_": "pathlib.Path.touch"}},
        {"sweeper": {"_target_": "pathlib.Path.touch"}},
        {"job_logging": {"handlers": {"mine": {"class": "logging.handlers.SMTPHandler"}}}},
        {"job_logging": {"handlers": {"console": {"stream": "ext://antigravity.x"}}}},
    ],
    ids=lambda hydra: f"{next(iter(hydra))}",
)
def test_a_config_has_nothing_called(own_configs, capsys, hydra, tmp_path):
    assert any("called" in one for one in hydra_checks.refused({"hydra": hydra}))
    if hydra in CALLED:
        said = refused(own_configs, capsys, hydra=hydra)
        assert "Only Hydra's own launchers" in said
        assert not (tmp_path / "bait").exists() and "antigravity" not in sys.modules


@pytest.mark.slow
@pytest.mark.parametrize("where", ["job_logging", "callbacks", "launcher"])
def test_a_section_that_stands_elsewhere_is_seen(own_configs, capsys, where, tmp_path):
    evil = {"handlers": {"mine": {"()": "pathlib.Path", "x": "bait"}}, "mine": TOUCH}
    said = refused(own_configs, capsys, evil=evil | TOUCH, hydra={where: "${evil}"})
    assert "called" in said or "full_key" in said
    assert not (tmp_path / "bait").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "hydra",
    [
        {"job": {"env_set": {"UNLORA_MODELS": "/"}}},
        {"job": {"env_set": "${evil}"}},
        {"job": {"env_set": {"GIT_TRACE": "${name}"}}},
        {"job": {"env_copy": ["MINE"]}},
        {"job": {"env_copy": "${names}"}},
        {"job": "${whole}"},
    ],
    ids=str,
)
def test_a_config_sets_no_variable_of_the_environment(own_configs, capsys, monkeypatch, hydra):
    monkeypatch.setenv("MINE", "/")
    others = {"evil": {"PATH": "bait"}, "name": "bait", "names": ["MINE"], "whole": {"env_set": {}}}
    said = refused(own_configs, capsys, hydra=hydra, **others)
    if hydra != {"job": "${whole}"}:  # which Hydra itself does not compose
        assert "no config may set variables" in said and "in your shell" in said
    whole = {"hydra": hydra} | others
    assert any("no config may set variables" in one for one in hydra_checks.refused(whole))


@pytest.mark.slow
def test_neither_does_a_word_of_the_command_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--multirun"]):
        words = [LORA, "task_name=x", "+hydra.job.env_set.HF_ENDPOINT=https://x.invalid", *more]
        with pytest.raises(SystemExit) as ended:
            main.launch(lambda cfg: pytest.fail("it ran"), "unlearn", words)
        assert ended.value.code == 2 and "hydra.job.env_set" in capsys.readouterr().err


@pytest.mark.slow
def test_a_plain_config_from_elsewhere_is_used(own_configs):
    assert len(own_configs(seed=3)) == 1


@pytest.mark.slow
def test_a_target_in_our_own_sections_is_only_a_wrong_key(own_configs, capsys):
    said = refused(own_configs, capsys, collator={"x": TOUCH}, model={"lora_config": TOUCH})
    assert "_target_" in said
    with pytest.raises(InputError, match="Unknown key of model.lora_config '_args_'"):
        section_as_written({"model_args": {}, "lora_config": TOUCH})


@pytest.mark.slow
def test_no_value_is_read_from_the_environment(own_configs, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MY_WORD", "very-secret-word")
    template = {"system_prompt": "${oc.env:MY_WORD}"}
    said = refused(own_configs, capsys, model={"template_args": template})
    assert "oc.env:MY_WORD" in said and "KEY=$MY_WORD" in said and "very-secret" not in said
    with pytest.raises(InputError, match="oc.env:MY_WORD"):
        plain(composed("unlearn", [LORA, "task_name='${oc.env:MY_WORD}'"]))
    with pytest.raises(InputError, match="oc.env:MY_WORD"):
        plain({"a": "${oc.env:MY_WORD}"})
    said = refused(own_configs, capsys, hydra={"run": {"dir": "${oc.env:MY_WORD}"}})
    assert "oc.env:MY_WORD" in said and not (tmp_path / "very-secret-word").exists()
    from omegaconf import OmegaConf

    assert OmegaConf.create({"a": "${oc.env:MY_WORD}"}).a == "very-secret-word", "only in ours"


def test_a_file_of_a_run_is_text_and_no_config(monkeypatch):
    monkeypatch.setenv("MY_WORD", "very-secret-word")
    text = "${oc.env:MY_WORD} ${nothing} $" + "{"
    args = {"pretrained_model_name_or_path": "x"}
    found = section_as_written({"model_args": args, "template_args": {"system_prompt": text}})
    assert found.template_args["system_prompt"] == text


def test_words_of_a_command_line_never_reach_a_shell(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word in ("$(touch bait)", "`touch bait`", "; touch bait", "| touch bait"):
        with pytest.raises(SystemExit):
            main.main(["unlearn", LORA, "task_name=x", f"trainer={word}"])
    assert not list(tmp_path.glob("bait*"))


# --- tasks of lm-eval and data sets ---------------------------------------------------------------


@pytest.mark.parametrize("key", ["doc_to_text", "process_docs", "class", "include"])
def test_a_task_folder_runs_no_code_unless_asked_to(tmp_path, key):
    pytest.importorskip("lm_eval")
    (tmp_path / "data.jsonl").write_text(json.dumps({"q": "a", "c": ["b", "c"], "a": 0}) + "\n")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'bait')!r}, 'w')\nf = lambda x: x\n")
    task = {
        "task": "theirs", "dataset_path": "json", "test_split": "test", "output_type":
        "multiple_choice", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "doc_to_text": "{{q}}", "doc_to_choice": "{{c}}", "doc_to_target": "{{a}}",
    }  # fmt: skip
    if key == "include":
        (tmp_path / "below").mkdir()
        (tmp_path / "evil.py").rename(tmp_path / "below" / "evil.py")
        (tmp_path / "below" / "base").write_text("doc_to_text: !function evil.f\n")
        task |= {"include": "below/base"}
        task.pop("doc_to_text")
        text = yaml.safe_dump(task)
    else:
        text = yaml.safe_dump({k: v for k, v in task.items() if k != key})
        text += f"{key}: !function evil.f\n"
    (tmp_path / "theirs.yaml").write_text(text)
    from unlora.evals.harness_tasks import load_tasks

    said = "!function evil.f, which is not run.*confirm_run_unsafe_code=true"
    with pytest.raises(InputError, match=said):
        load_tasks("lm", ["theirs"], [str(tmp_path)])
    assert not (tmp_path / "bait").exists()
    if key == "doc_to_text":
        load_tasks("lm", ["theirs"], [str(tmp_path)], run_code=True)
        assert (tmp_path / "bait").exists(), "so it would have been seen"


def test_a_script_beside_a_data_set_is_not_run(tmp_path, monkeypatch):
    from unlora.data.rows import load_rows

    folder = tmp_path / "someone" / "data"
    folder.mkdir(parents=True)
    (folder / "data.py").write_text(f"open({str(tmp_path / 'bait')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    for path in ("someone/data", str(folder), str(folder / "data.py"), "./someone/data/data.py"):
        with pytest.raises(InputError):
            load_rows(path)
    assert not (tmp_path / "bait").exists()


def test_a_pickle_is_no_data(tmp_path):
    import pickle

    from unlora.data.rows import load_rows

    for name in ("rows.pkl", "rows.bin", "rows.npy", "rows.pt"):
        (tmp_path / name).write_bytes(pickle.dumps([{"question": "a", "answer": "b"}]))
        with pytest.raises(InputError, match="of an unknown kind; it must be one of .json"):
            load_rows(str(tmp_path / name))
    with pytest.raises(InputError):
        load_rows("pandas", data_files=str(tmp_path / "rows.pkl"))


def test_a_data_set_cannot_ask_for_code():
    with pytest.raises(InputError, match=r"Unknown key of .*hf_args 'trust_remote_code'"):
        word = "+data.forget.x.args.hf_args.trust_remote_code=true"
        read(composed("unlearn", [LORA, "task_name=x", word]))
