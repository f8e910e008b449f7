"""What users type is understood; what they mistype ends in one message and exit code 2."""

import json
import logging
import os
import re
import shlex
import subprocess
import sys
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest

from unlora.cli.help import COMMANDS
from unlora.cli.main import launch, main, normalised
from unlora.cli.overrides import EXPERIMENTS, SHORT, choices
from unlora.errors import GuardError, InputError

SLOW = pytest.mark.slow
ROOT = Path(__file__).parents[2]
LORA = "experiment=unlearn/wmdp/lora"  # composes fastest


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Commands work from any folder, and write nothing but runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    return tmp_path


@pytest.mark.parametrize(
    "typed, read",
    [
        ("@experiment=unlearn/tofu/lora", "experiment=unlearn/tofu/lora"),
        ("experiment=unlearn/tofu/lora.yaml", "experiment=unlearn/tofu/lora"),
        ("experiment=a.yaml,b.yaml -m", "-m experiment=a,b"),
        ("trainer=NPO -cn=unlearn @experiment=x", "-cn=unlearn trainer=NPO experiment=x"),
        ("task_name=a --config-name unlearn", "--config-name unlearn task_name=a"),
        ("a.b=1 -cn unlearn --multirun c.d=2", "-cn unlearn --multirun ++a.b=1 ++c.d=2"),
        ("+model.use_lora=true", "++model.use_lora=true"),
        ("+@model.use_lora=true", "++model.use_lora=true"),
        ("++@model.use_lora=true", "++model.use_lora=true"),
        ("model.use_lora=true", "++model.use_lora=true"),
        ("~@data.retain", "~data.retain"),
        ("~data.retain", "~data.retain"),
        ("data/datasets@data.retain=MUSE_retain", "data/datasets@data.retain=MUSE_retain"),
        ("+data/datasets@data.train=MUSE_train", "+data/datasets@data.train=MUSE_train"),
        ("@trainer=NPO", "trainer=NPO"),
        ("task_name=x=y", "task_name=x=y"),
        ("+task_name=x", "++task_name=x"),
        ("task_name=a.yaml", "task_name=a.yaml"),
        ("hydra.verbose=true", "hydra.verbose=true"),
        ("hydra/launcher=joblib", "hydra/launcher=joblib"),
        ("~eval", "++evaluate=false"),
        ("~@eval", "++evaluate=false"),
        ("eval=null", "++evaluate=false"),
        ("eval=none", "++evaluate=false"),
        ("~eval.own", "~eval.own"),
        ("eval=tofu", "eval=tofu"),
        ("trainer=NPO --info config", "--info=config trainer=NPO"),
        ("trainer=NPO -i=config", "-i=config trainer=NPO"),
        ("-i trainer=NPO", "--info=all trainer=NPO"),
        ("trainer=NPO --info", "--info=all trainer=NPO"),
        ("--info ~eval", "--info=all ++evaluate=false"),
    ],
)  # fmt: skip
def test_command_lines_are_normalised(typed, read):
    assert normalised(typed.split()) == read.split()


PATH = "++model.model_args.pretrained_model_name_or_path="


@pytest.mark.parametrize(
    "typed, read",
    [
        ("model=saves/x", f"model=any {PATH}'saves/x'"),
        ("@model=Qwen/Qwen2.5-0.5B", f"model=any {PATH}'Qwen/Qwen2.5-0.5B'"),
        ("model=./x experiment=a/lora", f"model=any-lora {PATH}'./x' experiment=a/lora"),
        ("model=./x experiment=a/qlora", f"model=any-lora {PATH}'./x' experiment=a/qlora"),
        ("experiment=a/lora.yaml model=~/x", f"experiment=a/lora model=any-lora {PATH}'/home/x'"),
        ("model=a/b,c/d -m", f"-m model=any {PATH}'a/b','c/d'"),
        ("task_name=2024_05_01 -m", "-m task_name='2024_05_01'"),
        ("model=mine", f"model=any {PATH}'mine'"),
        ("model=pocket", "model=pocket"),  # a config, though there is such a folder, too
        ("model=pocket.yaml", "model=pocket"),
        ("model=pocket,a/b -m", "-m model=pocket,a/b"),
        ("model=other", "model=other"),
        ("model=choice(a/b,c/d)", "model=choice(a/b,c/d)"),
    ],
)
def test_a_model_may_be_given_by_its_path(elsewhere, monkeypatch, typed, read):
    monkeypatch.setenv("HOME", "/home")
    for name in ("mine", "pocket"):
        (elsewhere / name).mkdir()
    assert normalised(typed.split()) == read.split()


@pytest.mark.slow
@pytest.mark.default_cases(1)
@pytest.mark.parametrize("name", ["it's, (a) =b", "back\\slash", "\\'", "end\\", "тест {x}"])
def test_a_path_may_have_any_signs(elsewhere, name):
    (elsewhere / name).mkdir()
    (elsewhere / f"{name}.csv").write_text("question,answer\n")
    seen = []
    launch(seen.append, "eval", [f"model={name}", f"data.forget={name}.csv"])
    (cfg,) = seen
    assert cfg.model.model_args.pretrained_model_name_or_path == name
    assert cfg.data.forget == f"{name}.csv"
    assert re.fullmatch(r"eval_[\w.-]+", cfg.task_name)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    "typed, task_name",
    [
        ("model=saves/unlearn/mine/", "eval_mine"),
        ("model=saves/unlearn/mine/checkpoint-20", "eval_mine_checkpoint-20"),
        ("model=saves/unlearn/NPO/0", "eval_NPO_0"),
        ("model=Qwen/Qwen2.5-0.5B", "eval_Qwen2.5-0.5B"),
        ("model=pocket", "eval_pocket"),
        ("model=a/b task_name=c", "c"),
        ("model=a/b experiment=eval/own/default", "eval_own"),
    ],
)
def test_own_data_need_no_experiment_and_no_name(elsewhere, typed, task_name):
    (elsewhere / "my.csv").write_text("question,answer\n")
    seen = []
    launch(seen.append, "eval", ["data.forget=my.csv", *typed.split()])
    assert seen[0].task_name == task_name and list(seen[0].eval) == ["own"]


WRONG_EVALUATIONS = {
    "no such file": ("model=a/b data.forget=mi.csv", "no such file. Did you mean 'my.csv'?"),
    "a folder": ("model=a/b data.forget=folder", "'folder', which is a folder. Give one file"),
    "no file": ("model=a/b data.forget=5", "it must be one file of questions and answers."),
    "no data": ("model=a/b", "Or evaluate on your own data: data.forget=FILE."),
    "no model": ("data.forget=my.csv", "model is missing. Give model=PATH"),
    "unknown model": ("data.forget=my.csv model=pocket-lroa", "Did you mean 'pocket-lora'?"),
    "no path": ("data.forget=my.csv model=any", "pretrained_model_name_or_path has no value"),
    "no forget data": ("model=a/b data.retain=my.csv", "data.forget has no value."),
    "two kinds of data": ("experiment=eval/tofu/lora data.forget=my.csv", "Give one of them."),
    "unknown data": ("model=a/b data.forget=my.csv data.holdot=x", "Did you mean 'holdout'?"),
    "another suite": ("model=a/b data.forget=my.csv eval=tofu", "Give eval=own."),
}


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("typed, said", WRONG_EVALUATIONS.values(), ids=WRONG_EVALUATIONS)
def test_wrong_own_data_are_one_sentence(elsewhere, typed, said, capsys):
    from unlora.config import read

    (elsewhere / "my.csv").write_text("question,answer\n")
    (elsewhere / "folder").mkdir()
    with pytest.raises(SystemExit) as exit_:
        launch(read, "eval", typed.split())
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert said in err and out == ""
    assert all(line.endswith((".", "?", "=...")) for line in err.splitlines())


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    "flag, key, value",
    [("--plan", "plan", True), ("--json", "output", "json"), ("--quiet", "output", "quiet")],
)
def test_flags_of_an_evaluation_belong_to_few_commands(flag, key, value, capsys):
    seen = []
    launch(lambda cfg: seen.append(cfg[key]), "eval", ["experiment=eval/wmdp/lora", flag])
    assert seen == [value]
    main(["eval", "--help"])
    assert f"\n    {flag} " in capsys.readouterr().out
    others = ("train", "unlearn") if flag != "--plan" else ()
    for command in (*others, "alternates", "study"):
        with pytest.raises(SystemExit) as exit_:
            main([command, flag])
        assert exit_.value.code == 2
        assert f"{flag} is a flag of `unlora eval`" in capsys.readouterr().err
        main([command, "--help"])
        assert f"\n    {flag} " not in capsys.readouterr().out


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("flag, stream", [("--json", "err"), ("--quiet", "err"), (None, "out")])
def test_stdout_is_for_the_result_where_that_is_asked_for(flag, stream, capsys):
    def run(cfg):
        logging.getLogger("unlora.test").warning("by the way")

    launch(run, "eval", ["experiment=eval/wmdp/lora", *([flag] if flag else [])])
    said = capsys.readouterr()._asdict()
    assert said.pop(stream) == "by the way\n" and set(said.values()) == {""}


DOCUMENTED = [
    ("train", "--config-name=train @experiment=finetune/tofu/lora"),
    ("train", "--config-name=train experiment=finetune/muse/lora"),
    ("train", "--config-name=unlearn @experiment=unlearn/tofu/lora"),
    ("train", "--config-name=unlearn.yaml @experiment=unlearn/muse/lora"),
    ("train", "@experiment=unlearn/wmdp/lora --config-name=unlearn model=Llama-2-7b-hf-lora"),
    (
        "train",
        "--config-name=unlearn experiment=unlearn/tofu/default trainer=NPO "
        "forget_split=forget10 retain_split=retain90 task_name=X",
    ),
    ("eval", "experiment=eval/tofu/default task_name=X retain_logs_path=saves/R/TOFU_EVAL.json"),
]  # fmt: skip


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("config, typed", DOCUMENTED)
def test_documented_commands_compose(config, typed):
    from unlora.config import read

    seen = []
    launch(lambda cfg: seen.append(read(cfg)), config, typed.split())
    assert len(seen) == 1


@pytest.mark.slow
def test_all_overrides_arrive():
    from unlora.config import read

    typed = (
        "@experiment=unlearn/tofu/lora model=Qwen2.5-7B-Instruct +model.use_lora=true "
        "model.lora_config.r=8 model.lora_config.target_modules=all-linear model.lineage=stack "
        "trainer.args.learning_rate=1e-3 trainer.args.max_steps=3 trainer.method_args.beta=0.2 "
        "trainer=NPO paths.output_dir=out model.template_args.apply_chat_template=false "
        "data.anchor=retain eval.tofu.batch_size=4"
    )
    seen = []
    launch(lambda cfg: seen.append(read(cfg)), "unlearn", typed.split())
    config = seen[0]
    assert config.model.use_lora and config.model.lineage == "stack"
    assert config.model.lora_config["r"] == 8
    assert config.model.lora_config["target_modules"] == "all-linear"
    assert (config.trainer.args["learning_rate"], config.trainer.args["max_steps"]) == (1e-3, 3)
    assert config.trainer.method_args["beta"] == 0.2
    assert config.paths.output_dir == "out"
    assert config.data["anchor"] == "retain"
    assert config.eval["tofu"]["batch_size"] == 4


WRONG = {
    "unknown experiment": ("experiment=unlearn/tofu/lroa", "Did you mean 'unlearn/tofu/lora'?"),
    "no experiment": ("trainer=NPO", "experiment is missing. Give experiment=NAME."),
    "experiment of another config": ("experiment=finetune/tofu/lora", "--config-name=train"),
    "unknown model": (f"{LORA} model=Qwen2.5-3B-Instruct-lroa", "Did you mean 'Qwen2.5-3B-"),
    "unknown trainer": (f"{LORA} trainer=SimPNO", "Did you mean 'SimNPO'?"),
    "unknown data set": (f"{LORA} data/datasets@data.retain=TOFU_QA_retian", "'TOFU_QA_retain'?"),
    "unknown config": (f"--config-name=unlern {LORA}", "Did you mean 'unlearn'?"),
    "unknown key": (f"{LORA} task_nmae=x", "Did you mean 'task_name'?"),
    "unknown inner key": (f"{LORA} model.lora_config.lora_alhpa=3", "Did you mean 'lora_alpha'?"),
    "unknown added key": (f"{LORA} +model.use_lroa=true", "Did you mean 'use_lora'?"),
    "key without use": ("--config-name=train experiment=finetune/tofu/lora retain_split=retain90",
                        "retain_split has no use in this experiment"),
    "text for a number": (f"{LORA} model.lora_config.r=eight", "it must be a whole number."),
    "number in quotes": (f"{LORA} model.lora_config.r='8'", "is '8' (text)"),
    "unknown dtype": (f"{LORA} model.model_args.torch_dtype=bf61", "Did you mean 'bf16'?"),
    "no value": (f"{LORA} task_name=???", "task_name has no value."),
    "no equals sign": (f"{LORA} trainer", "Cannot read 'trainer'."),
    "letters to be quoted": (f"{LORA} task_name=тест", """must be quoted: task_name='"тест"'."""),
    "bad syntax": (f"{LORA} trainer.args.seed=[1", "Cannot read 'trainer.args.seed=[1'."),
    "several values in one run": (f"{LORA} task_name=a,b", "need --multirun"),
    "group chosen twice": (f"{LORA} +trainer=NPO", "Write trainer=NAME, without the +."),
    "suite not chosen": (f"{LORA} eval.muse.batch_size=1", "Give eval=muse."),
    "a file to forget": (f"{LORA} data.forget=my.csv", "data.forget.NAME.args.hf_args.path=my.csv"),
    "no such folder": (f"{LORA} --config-dir=nowhere", "nowhere"),
    "unknown value of a flag": (f"--info confg {LORA}", "Did you mean 'config'?"),
    "no published target": ("experiment=unlearn/tofu/default model=pocket", "Fine-tune one"),
}  # fmt: skip


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("typed, said", WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_sentence_and_exit_code_2(typed, said, capsys):
    from unlora.config import read

    with pytest.raises(SystemExit) as exit_:
        launch(read, "unlearn", typed.split())
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert said in err
    assert err.count("\n") == 1 and out == ""


def test_mistakes_found_while_running_exit_with_2(capsys):
    def run(cfg):
        raise InputError("The data are gone.")

    with pytest.raises(SystemExit) as exit_:
        launch(run, "unlearn", [LORA])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "The data are gone.\n"


def test_bugs_keep_their_traceback():
    def run(cfg):
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        launch(run, "unlearn", [LORA])


@pytest.mark.slow
def test_jobs_of_a_multirun_never_share_a_folder(elsewhere):
    seen = []
    launch(
        lambda cfg: seen.append((cfg.trainer.handler, cfg.trainer.args.output_dir)),
        "unlearn",
        [LORA, "trainer=GradAscent,NPO", "-m", "task_name=x"],
    )
    assert seen == [("GradAscent", "./saves/unlearn/x/0"), ("NPO", "./saves/unlearn/x/1")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "typed, folders",
    [
        pytest.param("task_name=a,b", ["./saves/unlearn/a", "./saves/unlearn/b"], marks=SLOW),
        pytest.param("paths.output_dir=a,b", ["a", "b"], marks=SLOW),
        pytest.param("task_name=a,b paths.output_dir=x", ["x/0", "x/1"], marks=SLOW),
        ("paths.output_dir=a,b trainer=NPO,DPO", ["a/0", "a/1", "b/2", "b/3"]),
    ],
)
def test_jobs_with_a_name_each_keep_it(typed, folders):
    seen = []
    launch(lambda cfg: seen.append(cfg.paths.output_dir), "unlearn", [LORA, "-m", *typed.split()])
    assert seen == folders


def test_text_in_quotes_may_hold_any_letters():
    seen = []
    launch(lambda cfg: seen.append(cfg.task_name), "unlearn", [LORA, """task_name='тест'"""])
    assert seen == ["тест"]


def test_every_command_silences_what_is_handled(monkeypatch):
    def export(argv):
        warnings.warn("Model has `tie_word_embeddings=True` and ...", stacklevel=1)
        warnings.warn("A worker stopped while some jobs were given to the ...", stacklevel=1)
        warnings.warn("This one is not.", stacklevel=1)

    monkeypatch.setattr("unlora.cli.export.main", export)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        main(["export", "run", "--merged"])
    assert [str(warning.message) for warning in caught] == ["This one is not."]


@pytest.mark.slow
@pytest.mark.default_cases(1)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_several_processes_the_first_talks_and_the_others_say_what_went_wrong(
    rank, monkeypatch, capfd
):
    monkeypatch.setenv("RANK", rank)
    bars = [f"{library}_DISABLE_PROGRESS_BARS" for library in ("HF_HUB", "HF_DATASETS")]
    for name in (*bars, "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # what is set in the test is gone after it

    def run(cfg):
        logging.getLogger("unlora.recipes.train").warning("a warning")
        warnings.warn("of a library", stacklevel=1)
        raise InputError("This is wrong.")

    level = logging.getLogger().level
    with warnings.catch_warnings(record=True) as caught, pytest.raises(SystemExit):
        warnings.simplefilter("always")
        launch(run, "unlearn", [LORA])
    logging.getLogger().setLevel(level)
    said = "".join(capfd.readouterr())
    assert "This is wrong." in said
    assert ("a warning" in said) == (rank == "0")
    assert ("of a library" in map(str, (one.message for one in caught))) == (rank == "0")
    assert [os.environ.get(name) for name in bars] == ([None] if rank == "0" else ["1"]) * 2


@pytest.mark.slow
def test_a_failed_job_does_not_stop_the_others(capsys):
    seen = []

    def run(cfg):
        seen.append(cfg.trainer.handler)
        if cfg.trainer.handler == "GradAscent":
            raise InputError("This one is wrong.")

    with pytest.raises(SystemExit) as exit_:
        launch(run, "unlearn", [LORA, "trainer=GradAscent,NPO", "-m"])
    assert exit_.value.code == 2
    assert seen == ["GradAscent", "NPO"]
    assert "This one is wrong.\n" in capsys.readouterr().err


@pytest.mark.slow
def test_hydra_leaves_no_files_behind(elsewhere):
    launch(lambda cfg: None, "unlearn", [LORA])
    assert list(elsewhere.iterdir()) == []


@pytest.mark.slow
def test_own_configs_are_found(elsewhere):
    folder = elsewhere / "mine" / "experiment" / "mine"
    folder.mkdir(parents=True)
    (folder / "first.yaml").write_text(
        "# @package _global_\ndefaults: [/experiment/unlearn/wmdp/lora]\ntask_name: first\n"
    )
    seen = []
    launch(
        lambda cfg: seen.append(cfg.task_name),
        "unlearn",
        ["experiment=mine/first.yaml", "--config-dir", "mine"],
    )
    assert seen == ["first"]


def test_the_composed_config_can_be_printed(capsys):
    launch(lambda cfg: pytest.fail("ran"), "unlearn", [LORA, "--cfg", "job"])
    assert "task_name: unlearn_wmdp_lora" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("typed", [f"{LORA} --info config", f"--info {LORA}", f"-i=config {LORA}"])
def test_what_hydra_made_of_the_configs_can_be_printed(typed, capsys):
    launch(lambda cfg: pytest.fail("ran"), "unlearn", typed.split())
    said = capsys.readouterr()
    assert "Defaults Tree" in said.out and "task_name: unlearn_wmdp_lora" in said.out
    assert said.err == ""


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_prints_the_version_of_this_program(command, capsys):
    main([*filter(None, [command]), "--version"])
    assert capsys.readouterr().out == f"unlora {version('unlora')}\n"


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "report"])
def test_every_command_explains_itself_with_examples(command, capsys):
    main([command, "--help"])
    said = capsys.readouterr().out
    assert said.startswith(f"usage: unlora {command}")
    assert sum(f"unlora {command}" in line for line in said.splitlines()) >= 3  # usage and two
    assert max(map(len, said.splitlines())) <= 100
    if command in EXPERIMENTS:
        assert f"{EXPERIMENTS[command]}/" in said


EXAMPLES = [line for name in EXPERIMENTS for line in COMMANDS[name].examples]
EXAMPLES = [shlex.split(example.replace("\\\n", "")) for example in EXAMPLES]


@pytest.mark.parametrize("words", EXAMPLES, ids=" ".join)
def test_every_example_names_what_is_there(words):
    name, *rest = words
    for word in rest:
        key, equals, value = word.partition("=")
        if key in ("experiment", "trainer") or (key == "model" and "/" not in value):
            assert {*value.split(",")} <= {*choices(key, name, rest)}
        elif not equals:
            assert word in ("-m", *(flag for flag, (owners, _) in SHORT.items() if name in owners))


@pytest.mark.slow
@pytest.mark.default_cases(1)
@pytest.mark.parametrize("words", [x for x in EXAMPLES if "pocket/" in str(x)], ids=" ".join)
def test_the_examples_of_the_benchmark_that_is_here_compose(words):
    seen = []
    launch(seen.append, words[0], words[1:])
    assert len(seen) == 1


def test_the_overview_fits_a_screen_and_names_every_command(capsys):
    main([])
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    shown = [line.split()[0] for line in lines if line.startswith("  ")]
    assert shown[:5] == ["train", "unlearn", "eval", "study", "report"]
    others = said.partition("others:")[2].partition("\n\n")[0]
    assert {*shown[:5], *others.replace(",", " ").split()} == {*COMMANDS}


@pytest.mark.parametrize(
    "typed, said",
    [
        ("unlaern", "Did you mean 'unlearn'?"),
        ("finetune", "Type: unlora train --help"),
        ("xyz", "Type: unlora --help"),
        ("experiment=finetune/tofu/lora", "Type: unlora train experiment=finetune/tofu/lora"),
        ("saves/x", "unlora chat saves/x"),
        ("export", "Which run?"),
        ("export nofolder --merged", "There is no run folder 'nofolder'."),
        ("export . ", "In which form?"),
        ("export . --merged --adapter", "In which form?"),
        ("export . --megred", "cannot use '--megred'"),
    ],
)
def test_a_wrong_command_says_what_to_type_and_exits_with_2(typed, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(typed.split())
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("flag, owner", [("--json", "eval"), ("--dry-run", "study")])
def test_a_flag_of_one_command_is_refused_by_another(flag, owner, capsys):
    with pytest.raises(SystemExit):
        main(["unlearn", LORA, flag])
    assert f"{flag} is a flag of `unlora {owner}`; unlearn has no such" in capsys.readouterr().err


def test_a_dry_run_is_a_key_of_the_study():
    seen = []
    launch(seen.append, "study", ["experiment=study/pocket/lora", "--dry-run"])
    assert seen[0].dry_run is True


def test_the_report_is_made_by_its_own_command(monkeypatch):
    seen = []
    command = types.ModuleType("unlora.cli.report")
    command.main = seen.append
    monkeypatch.setitem(sys.modules, "unlora.cli.report", command)
    main(["report", "a", "--help"])
    assert seen == [["a", "--help"]]


def test_doctor_says_what_is_here(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    main(["doctor"])
    said = capsys.readouterr().out
    for line in ("python", "torch", "memory", "gpu", "disk", "hub"):
        assert f"\n{line} " in f"\n{said}"


def test_packages_that_do_not_fit_are_refused(monkeypatch):
    from unlora.cli.main import refuse_broken_stack

    versions = {"peft": "0.17.1", "transformers": "4.57.6"}
    monkeypatch.setattr("importlib.metadata.version", versions.__getitem__)
    refuse_broken_stack()
    versions["transformers"] = "5.23.0"
    with pytest.raises(InputError, match=r"peft 0\.17\.1 does not work with transformers 5\.23\.0"):
        refuse_broken_stack()


def program(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, env={**os.environ}, timeout=60
    )


@pytest.mark.slow
def test_scripts_exit_with_2_on_a_typo():
    done = program(
        str(ROOT / "src/train.py"), "--config-name=unlearn", "@experiment=unlearn/tofu/lroa"
    )
    assert done.returncode == 2
    assert "Did you mean 'unlearn/tofu/lora'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_installation_one_sentence_says_what_to_do():
    done = program("-S", str(ROOT / "src/train.py"))
    assert done.returncode != 0
    assert "pip install -e ." in done.stderr
    assert "Traceback" not in done.stderr


QUICK = [
    *("--help", "train --help", "unlearn --help", "eval --help", "study --help", "chat --help"),
    *("export --help", "doctor --help", "completion --help", "unlaern", "export nowhere --merged"),
    "unlearn experiment=unlearn/tofu/lroa",
    f"unlearn {LORA} task_nmae=x",
    f"unlearn {LORA} trainer.args.learning_rat=1",
    f"unlearn {LORA} model.lora_config.r=eight",
    f"unlearn {LORA} ~data.retain trainer.method_args.alpha=1",
    "train experiment=finetune/tofu/lora trainer=NPO",
    "alternates experiment=unlearn/tofu/lora +x=1",
    "eval data.forget=nowhere.csv model=a/b",
    "study experiment=study/pocket/lora workers=x",
    "doctor experiment=unlearn/tofu/lroa",
    f"doctor {LORA} task_nmae=x",
    "chat",
    "chat ./nowhere",
]


@pytest.mark.slow
@pytest.mark.parametrize("commands", [QUICK[::6], pytest.param(QUICK, marks=SLOW)], ids=len)
def test_help_and_mistakes_do_not_wait_for_torch(commands):
    """Each in a process of its own, two at a time."""
    code = (
        "import sys, unlora.cli.main\n"
        "try: unlora.cli.main.main()\n"
        "except SystemExit as left: code = left.code\n"
        "else: code = 0\n"
        "found = sorted({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules))\n"
        "print(f'code {code}', found)"
    )
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda typed: program("-c", code, *typed.split()), commands))
    last = [one.stdout.splitlines()[-1] for one in done]
    wanted = [f"code {0 if '--help' in typed else 2} []" for typed in commands]
    assert dict(zip(commands, last, strict=True)) == dict(zip(commands, wanted, strict=True))


def test_commands_that_only_read_run_folders_do_not_wait_for_torch(elsewhere):
    """One process for all of them; a run with rows of its own, so that who-saw has work to do."""
    run = elsewhere / "saves" / "run"
    run.mkdir(parents=True)
    (elsewhere / "rows.jsonl").write_text('{"question": "Who?", "answer": "Ada."}\n')
    args = {"hf_args": {"path": "rows.jsonl"}, "question_key": "question", "answer_key": "answer"}
    content = {
        "mode": "finetune",
        "model": {"model_args": {"pretrained_model_name_or_path": "a/b"}},
        "data": {"train": {"own": {"handler": "QADataset", "args": args}}},
    }
    (run / "run_config.json").write_text(json.dumps(content))
    code = (
        "import sys\n"
        "from unlora.cli.main import main\n"
        "for typed in ('who-saw rows.jsonl saves', 'verify saves', 'rollback x', 'report saves'):\n"
        "    try: main(typed.split())\n"
        "    except SystemExit: pass\n"
        "    heavy = {'torch', 'transformers', 'peft', 'datasets', 'scipy'} & {*sys.modules}\n"
        "    print(typed, sorted(heavy))\n"
    )
    lines = program("-c", code).stdout.splitlines()
    assert "1 of 1 rows were seen; runs: 1." in lines
    for typed in ("who-saw rows.jsonl saves", "verify saves", "rollback x", "report saves"):
        assert f"{typed} []" in lines


@pytest.mark.slow
def test_a_mistake_in_a_config_costs_little_time():
    before = os.times()
    assert program("-m", "unlora", "unlearn", LORA, "task_nmae=x").returncode == 2
    after = os.times()
    # about 0.8 s on an idle core; several times as much where the cores are shared
    assert after.children_user - before.children_user < 5


@pytest.mark.slow
def test_a_guard_that_stops_a_run_speaks_in_words_and_exits_with_1(capsys):
    def run(cfg):
        raise GuardError("start equals target: it does not")

    with pytest.raises(SystemExit) as left:
        launch(run, "unlearn", [LORA])
    assert left.value.code == 1
    assert capsys.readouterr().err == "start equals target: it does not\n"


def interrupt(*_):
    raise KeyboardInterrupt


AT_WORK = {
    "train": "unlora.recipes.train",
    "unlearn": "unlora.recipes.train",
    "eval": "unlora.recipes.evaluate",
    "study": "unlora.studies.run_study",
    "alternates": "unlora.recipes.alternate_answers",
    "export": "unlora.cli.export",
    "report": "unlora.cli.report",
    "doctor": "unlora.cli.doctor",
}


def test_demo_is_the_study_of_the_embedded_benchmark(monkeypatch):
    launched = []
    monkeypatch.setattr("unlora.cli.main.launch", lambda _, *words: launched.append(words))
    main(["demo", "seeds=[0]"])
    assert launched == [("study", ["experiment=study/pocket/lora", "seeds=[0]"])]


@pytest.mark.slow
@pytest.mark.default_cases(1)
@pytest.mark.parametrize("command", AT_WORK)
def test_ctrl_c_is_one_sentence_and_code_130(command, monkeypatch, capsys):
    stopped = types.ModuleType(AT_WORK[command])
    stopped.run = stopped.main = interrupt
    monkeypatch.setitem(sys.modules, AT_WORK[command], stopped)
    experiments = {"train": "finetune/pocket/lora", "unlearn": LORA.partition("=")[2],
                   "eval": "eval/pocket/default", "study": "study/pocket/lora",
                   "alternates": "unlearn/pocket/lora"}  # fmt: skip
    words = [f"experiment={experiments[command]}"] if command in experiments else ["mine"]
    with pytest.raises(SystemExit) as left:
        main([command, *words])
    assert left.value.code == 130
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("Stopped by Ctrl-C.")


@pytest.mark.slow
def test_ctrl_c_says_what_a_training_has_kept(capsys, monkeypatch):
    def run(cfg):
        raise KeyboardInterrupt("Stopped by Ctrl-C. The checkpoint 2 was written.")

    with pytest.raises(SystemExit) as left:
        launch(run, "unlearn", [LORA, "task_name=mine"])
    assert left.value.code == 130
    assert capsys.readouterr().err == "Stopped by Ctrl-C. The checkpoint 2 was written.\n"


@pytest.mark.slow
def test_a_run_knows_the_command_line_that_was_typed():
    seen = []
    launch(lambda cfg: seen.extend(sys.argv), "unlearn", [LORA, "task_name=mine", "a.yaml.b=1"][:2])
    assert seen[1:] == ["unlearn", LORA, "task_name=mine"]


@pytest.mark.slow
@pytest.mark.default_cases(1)
@pytest.mark.parametrize("word", ["~eval", "eval=null", "evaluate=false"])
def test_an_evaluation_can_be_left_out(word):
    from unlora.cli.compose import composed
    from unlora.config import read

    whole = ["experiment=unlearn/pocket/lora", "trainer=NPO"]
    assert list(read(composed("unlearn", whole)).eval) == ["tofu"]
    assert read(composed("unlearn", [*whole, word])).eval == {}


def test_an_evaluation_of_nothing_is_refused():
    from unlora.cli.compose import composed
    from unlora.config import read

    with pytest.raises(InputError, match="mode is eval, but no suite is chosen"):
        read(composed("eval", ["experiment=eval/pocket/default", "~eval"]))
