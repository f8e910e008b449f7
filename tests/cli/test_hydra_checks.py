"""What someone else's config or flag could have Hydra do: nothing is called, imported or written.

Each case is one thing that would run code, or write a file outside the run folder, if it were let
through. ``test_no_code_from_data.py`` sends some of them through whole commands, with a file that
would be touched.
"""

import os
import pickle
import sys
from itertools import product
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf, open_dict

from unlora.cli import main
from unlora.cli.hydra_checks import only_known_packages, refused, refused_files
from unlora.cli.messages import refuse_foreign_flags
from unlora.cli.overrides import EXPERIMENTS, normalised
from unlora.errors import InputError
from unlora.runs.run import alone, make_writable

# --- flags ---------------------------------------------------------------------------------------

RERUN = (
    "--experimental-rerun=bait", "--experimental-rerun", "--experimental-rer", "--exp=bait", "--e",
    "--experimental_rerun=bait", "@--experimental-rerun=bait", "@--exp=bait",
)  # fmt: skip
OTHERS = ("--shell-completion", "--shell", "-sc", "@-sc", "--", "-rm", "-cjob", "--multi")


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("flag", [*RERUN, *OTHERS])
def test_a_flag_that_is_not_known_reaches_no_hydra(flag, name):
    words = ["experiment=x", flag, "bait"]
    with pytest.raises(InputError, match="Hydra|Unknown flag|Cannot read"):
        refuse_foreign_flags(name, words)
        refuse_foreign_flags(name, normalised(words))


@pytest.mark.parametrize("flag", ["--experimental-rerun=run.pickle", "@--exp=run.pickle"])
def test_no_pickle_of_a_run_is_read(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run.pickle").write_bytes(pickle.dumps({"hydra": {}}))
    monkeypatch.setattr(pickle, "load", lambda *_: pytest.fail("it was unpickled"))
    with pytest.raises(SystemExit) as ended:
        main.main(["unlearn", "experiment=unlearn/wmdp/lora", flag])
    assert ended.value.code == 2
    assert "--experimental-rerun would have Hydra unpickle a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["--cfg", "job"], ["--cfg=hydra"], ["-c", "all"], ["--multirun"], ["-m"], ["--info"],
     ["--info=plugins"], ["--config-name", "eval"], ["-cn=eval"], ["--config-dir", "x"],
     ["--resolve"], ["--package=model"], ["--hydra-help"], ["a.b=-1"], ["a.b='--exp'"]],
    ids=" ".join,
)  # fmt: skip
def test_the_flags_that_are_known_are_let_through(words):
    refuse_foreign_flags("eval", words)
    refuse_foreign_flags("eval", normalised(words))


# --- what is called ------------------------------------------------------------------------------

CALLABLES = (
    "os.system", "subprocess.Popen", "builtins.exec", "pathlib.Path.touch", "shutil.rmtree",
    "pickle.load", "logging.handlers.SMTPHandler", "logging.handlers.SocketHandler",
    "logging.config.fileConfig", "unlora.cli.main.main", "torch.load", "${evil}",
)  # fmt: skip
# place of a name -> the section that has it
PLACES = {
    "callback": lambda name: {"callbacks": {"mine": {"_target_": name}}},
    "launcher": lambda name: {"launcher": {"_target_": name}},
    "sweeper": lambda name: {"sweeper": {"_target_": name}},
    "inside a launcher": lambda name: {"launcher": {"mine": [{"_target_": name}]}},
    "handler": lambda name: {"job_logging": {"handlers": {"mine": {"class": name}}}},
    "handler made by ()": lambda name: {"hydra_logging": {"handlers": {"mine": {"()": name}}}},
    "formatter": lambda name: {"job_logging": {"formatters": {"mine": {"class": name}}}},
    "formatter made by ()": lambda name: {"job_logging": {"formatters": {"mine": {"()": name}}}},
    "filter": lambda name: {"job_logging": {"filters": {"mine": {"()": name}}}},
    "stream": lambda name: {
        "job_logging": {"handlers": {"mine": {"class": "logging.StreamHandler",
                                              "stream": f"ext://{name}"}}}
    },
    "reference": lambda name: {"job_logging": {"root": {"handlers": [f"ext://{name}"]}}},
}  # fmt: skip


@pytest.mark.parametrize("place, name", product(PLACES, CALLABLES))
def test_nothing_is_called_that_a_config_names(place, name):
    [*said] = refused({"hydra": PLACES[place](name), "evil": {"_target_": "os.system"}})
    assert any("called" in one for one in said), said


@pytest.mark.parametrize(
    "handler",
    [
        {"class": "logging.FileHandler", "filename": "x.log", ".": {"baseFilename": "/bait"}},
        {"class": "logging.StreamHandler", "stream": "bait"},
        {"class": "logging.StreamHandler", "stream": {"()": "pathlib.Path"}},
        {"class": "logging.StreamHandler", "strm": "ext://sys.stdout"},
    ],
    ids=str,
)
def test_a_handler_has_known_arguments(handler):
    assert [*refused({"hydra": {"job_logging": {"handlers": {"mine": handler}}}})]


@pytest.mark.parametrize(
    "formatter",
    [
        {"class": "logging.FileHandler", "format": "/bait"},  # its first argument is a file
        {"class": "logging.Formatter", "style": "{", "format": "{args.__class__.__init__}"},
        {"()": "logging.Formatter", "defaults": {"a": 1}},
    ],
    ids=str,
)
def test_a_formatter_formats_and_reaches_for_nothing(formatter):
    assert [*refused({"hydra": {"job_logging": {"formatters": {"mine": formatter}}}})]


REACHING = {
    "setup": ["touch bait"], "python": "sh bait", "srun_args": ["--bcast=bait"],
    "additional_parameters": {"wrap": "touch bait"}, "env_setup": {"commands": ["touch bait"]},
    "ray": {"init": {"runtime_env": {"py_executable": "bait"}}}, "storage": "sqlite:///bait",
    "custom_search_space": "bait.f",
}  # fmt: skip


@pytest.mark.parametrize("plugin", ["launcher", "sweeper"])
@pytest.mark.parametrize("key", REACHING)
def test_commands_of_a_launcher_are_typed_and_stand_in_no_config(key, plugin):
    content = {"hydra": {plugin: {key: REACHING[key]}}}
    assert "may run a command" in next(refused(content))
    assert not [*refused(content, [f"+hydra.{plugin}.{key}=x"])]
    assert [*refused(content, [f"hydra.{plugin}.n_jobs=1", "task_name=setup"])]


def test_a_line_of_a_launcher_stays_one_line():
    content = {"hydra": {"launcher": {"comment": "mine\ntouch bait"}}}
    assert "one line" in next(refused(content))


# --- what is imported ----------------------------------------------------------------------------


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("package", ["antigravity", "this", "os", "unlora", "unlora.configs.x", ""])
@pytest.mark.parametrize("way", ["searchpath", "config path"])
def test_no_package_is_imported_for_its_configs(package, way, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if way == "searchpath":
        with pytest.raises(InputError, match="imported"), only_known_packages():
            with initialize_config_module("unlora.configs", version_base=None):
                compose("eval", [f"hydra.searchpath=[pkg://{package}]"])
    else:
        with pytest.raises(SystemExit) as ended:
            main.main(["eval", "experiment=eval/wmdp/lora", f"--config-path=pkg://{package}"])
        assert ended.value.code == 2 and "imported" in capsys.readouterr().err
    assert "antigravity" not in sys.modules


# --- what is written -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def composed_config():
    with initialize_config_module("unlora.configs", version_base=None):
        words = ["experiment=eval/wmdp/lora", "task_name=mine", "hydra/launcher=joblib"]
        return compose("eval", words, return_hydra_config=True)


OUTSIDE = (
    "/tmp/bait",
    "../bait",
    "bait",
    "saves/eval/bait",
    "${paths.output_dir}/../bait",
    "${paths.output_dir}x/bait",
    "${paths.output_dir}/link/bait",
    "${nowhere}/bait",
)


def handler(logs, kind):
    key = f"hydra.{logs}.handlers.mine"
    return {f"{key}.class": f"logging.{kind}", f"{key}.filename": "{}.log"}


WRITERS = {
    "the file of a log": handler("job_logging", "FileHandler"),
    "the file of Hydra's log": handler("hydra_logging", "FileHandler"),
    "a rotating file": handler("job_logging", "handlers.RotatingFileHandler"),
    "a rotating file of Hydra's": handler("hydra_logging", "handlers.RotatingFileHandler"),
    "the folder of a run": {"hydra.run.dir": "{}"},
    "the folder of a multirun": {"hydra.mode": "MULTIRUN", "hydra.sweep.dir": "{}"},
    "the folder of a job": {"hydra.mode": "MULTIRUN", "hydra.sweep.subdir": "../{}"},
    "the folder of a launcher": {"hydra.launcher.temp_folder": "{}"},
}


def config_with(config, settings, path):
    config = config.copy()
    OmegaConf.set_readonly(config, False)
    OmegaConf.set_readonly(config.hydra, False)
    with open_dict(config):
        for key, value in settings.items():
            OmegaConf.update(config, key, value.replace("{}", path), force_add=True)
    return config


@pytest.mark.default_cases(8)
@pytest.mark.parametrize("writer, path", product(WRITERS, OUTSIDE))
def test_hydra_writes_in_the_run_folder_alone(writer, path, composed_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("saves/eval/mine").mkdir(parents=True)
    Path("saves/eval/mine/link").symlink_to(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    found = config_with(composed_config, WRITERS[writer], path)
    [*said] = refused_files(found)
    assert said and all("Nothing is written elsewhere" in one for one in said), said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_written_in_the_run_folder_is_let_through(
    writer, composed_config, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = "x" if writer == "the folder of a job" else "${paths.output_dir}/x"
    settings = {key: value.replace("../", "") for key, value in WRITERS[writer].items()}
    assert not [*refused_files(config_with(composed_config, settings, path))]


@pytest.mark.parametrize("below", ["${hydra.job.num}", "${hydra.job.id}", "a"])
def test_a_sweep_may_have_the_numbers_of_its_jobs(below, composed_config):
    settings = {"hydra.mode": "MULTIRUN", "hydra.sweep.dir": "${paths.output_dir}",
                "hydra.sweep.subdir": below}  # fmt: skip
    assert not [*refused_files(config_with(composed_config, settings, ""))]


@pytest.mark.parametrize("key", ["hydra.run.dir", "hydra.sweep.dir"])
def test_what_a_user_types_of_a_folder_is_theirs(key, composed_config):
    settings = {key: "/elsewhere"} | ({"hydra.mode": "MULTIRUN"} if "sweep" in key else {})
    found = config_with(composed_config, settings, "")
    assert [*refused_files(found)] and not [*refused_files(found, [f"{key}=/elsewhere"])]


@pytest.mark.parametrize("name", ["manifest.json", "adapter_model.safetensors", ".bashrc", "x.py"])
def test_a_log_is_no_file_of_another_kind(name, composed_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = handler("job_logging", "FileHandler")
    settings["hydra.job_logging.handlers.mine.filename"] = "${paths.output_dir}/" + name
    [said] = refused_files(config_with(composed_config, settings, ""))
    assert "NAME.log" in said


def test_a_log_that_hydra_would_write_elsewhere_is_refused_with_what_to_add(composed_config):
    settings = handler("job_logging", "FileHandler")
    found = config_with(composed_config, settings, "${hydra.runtime.output_dir}/cli")
    words = ["hydra/job_logging=default"]
    [said] = refused_files(found, words)
    added = "hydra.job_logging.handlers.mine.filename='${paths.output_dir}/run.log'"
    assert f"add {added}, or leave hydra/job_logging out" in said
    key, _, value = added.partition("=")
    assert not [*refused_files(config_with(found, {key: value.strip("'")}, ""), [*words, added])]


def test_hydra_writes_no_config_of_its_own():
    assert "secrets" in next(refused({"hydra": {"output_subdir": ".hydra"}}))


# --- the run folder ------------------------------------------------------------------------------

NAMES = ("evals", "data", "logs", "checkpoint-5", "exported", "adapter_model.safetensors",
         "manifest.json", "evals/OWN_EVAL.json")  # fmt: skip


@pytest.mark.parametrize("target", ["folder", "file", "relative", "not there"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_written_through_a_link_in_the_run_folder(name, target, tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("mine")
    (run / name).parent.mkdir(parents=True)
    targets = {
        "folder": elsewhere,
        "file": elsewhere / "file",
        "relative": os.path.relpath(elsewhere, (run / name).parent),
        "not there": elsewhere / "new",
    }
    (run / name).symlink_to(targets[target])
    for door in (lambda: make_writable(run), lambda: alone(run).__enter__()):
        with pytest.raises(InputError, match=f"{name}' is a link to .*Remove the link"):
            door()
    assert (elsewhere / "file").read_text() == "mine" and len(list(elsewhere.iterdir())) == 1


def test_a_link_within_the_run_folder_and_a_link_to_it_are_right(tmp_path):
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "run" / "best").symlink_to("checkpoint-5")
    (tmp_path / "other").symlink_to("run")
    make_writable(tmp_path / "other")


@pytest.mark.parametrize(
    "place",
    ["/dev/null", "/dev/null/x", "/dev/mine", "/dev/fd/x", "/dev/../dev/mine", "/proc/self/mine",
     "/proc/mine", "/sys/mine", "link/mine"],
)  # fmt: skip
def test_nothing_is_written_among_the_devices(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("/dev")
    for door in (lambda: make_writable(Path(place)), lambda: alone(place).__enter__()):
        with pytest.raises(InputError, match="among the devices of the system"):
            door()
    assert not Path("/dev/.mine.lock").exists() and not Path("/dev/mine").exists()
