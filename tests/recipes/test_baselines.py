"""References of an evaluation: a log, a run folder, a model, or found by itself."""

import json
import logging
import os
import shutil
import weakref
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tiny import llama, tokenizer

import unlora.model
from unlora.cli import compose
from unlora.cli.main import normalised
from unlora.config import read
from unlora.data.rows import ReadRows
from unlora.errors import InputError
from unlora.recipes import baselines, train
from unlora.recipes import evaluate as evaluation
from unlora.recipes.baselines.retain_model import Unseen
from unlora.recipes.trained_rows import trained_rows

METRICS = ("forget_Q_A_PARA_Prob", "forget_Q_A_PERT_Prob", "forget_truth_ratio", "forget_quality",
           "retain_Q_A_Prob")  # fmt: skip
AGG = {
    "handler": "agg_utility",
    "inputs": {
        "utility": "retain_Q_A_Prob",
        "fluency": "forget_Q_A_PARA_Prob",
        "target_utility": "retain_Q_A_Prob",
        "target_fluency": "forget_Q_A_PARA_Prob",
    },
}
TRAINING = ("trainer.args.max_steps=1", "trainer.args.per_device_train_batch_size=2",
            "trainer.args.learning_rate=1e-2", "trainer.args.disable_tqdm=true")  # fmt: skip
FULL = "data.train.TOFU_QA_full.args.hf_args"


def qa(n):
    return {
        "question": f"What is {n}?",
        "answer": f"It is {n * 7}.",
        "paraphrased_answer": f"That is {n * 7}.",
        "perturbed_answer": [f"No {n}.", f"Not {n}."],
    }


def write(folder, splits):
    for name, rows in splits.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))


@cache
def composed(name, experiment, *groups):
    """The shipped config, with few metrics."""
    cfg = compose.composed(name, [f"experiment={experiment}", *groups])
    OmegaConf.set_struct(cfg, False)
    cfg.eval.tofu.metrics = {m: cfg.eval.tofu.metrics[m] for m in METRICS} | {"agg": AGG}
    cfg.eval.tofu.update({"path": "data", "max_new_tokens": 2, "panel": ["retain_Q_A_Prob"]})
    cfg.model.tokenizer_args.pretrained_model_name_or_path = "root"
    cfg.model.model_args.torch_dtype = "float32"
    cfg.model.lora_config.r = 2
    for part in ("train", "forget", "retain"):
        for declared in ((cfg.get("data") or {}).get(part) or {}).values():
            declared.args.hf_args.path = "data"
    return cfg


def config(name, experiment, *overrides, groups=()):
    return OmegaConf.merge(composed(name, experiment, *groups), OmegaConf.from_dotlist(overrides))


def start(path):
    return f"model.model_args.pretrained_model_name_or_path={path}"


def finetune(split, *overrides, name=None):
    return train.run(
        config("train", "finetune/tofu/lora", start("root"), f"{FULL}.name={split}",
               f"task_name={name or split}", *TRAINING, *overrides)
    )  # fmt: skip


def unlearn_config(*overrides):
    return config(
        "unlearn", "unlearn/tofu/lora", start("saves/finetune/full"),
        *TRAINING, *overrides, groups=("trainer=GradDiff",),
    )  # fmt: skip


def eval_config(*overrides, model="saves/unlearn/npo"):
    return config("eval", "eval/tofu/lora", start(model), *overrides)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data of 20 rows, a fine-tuned model, one that never saw the last two rows, one unlearned."""
    home = tmp_path_factory.mktemp("made")
    (home / "data").mkdir()
    rows = [qa(n) for n in range(20)]
    write(home / "data", {
        "full": rows, "retain90": rows[:18], "retain95": rows[:19], "forget10": rows[18:],
        "forget10_perturbed": rows[18:], "forget05_perturbed": rows[19:],
        "retain_perturbed": rows[:4], "real_authors_perturbed": rows[:2],
        "world_facts_perturbed": rows[:2], "holdout10": [qa(n) for n in range(40, 42)],
    })  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("UNLORA_CACHE", str(home / "cache"))
        llama(max_position_embeddings=512).save_pretrained("root")
        tokenizer().save_pretrained("root")
        finetune("full")
        finetune("retain90")
        train.run(unlearn_config("task_name=npo"))
    return home


@pytest.fixture
def home(made, tmp_path, monkeypatch):
    """A copy of it, to work in."""
    shutil.copytree(made, tmp_path / "home", ignore=shutil.ignore_patterns("cache"))
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def find(*overrides, of=eval_config, key="retain_logs_path"):
    found = baselines.find(read(of(*overrides)))
    return found, found.eval["tofu"][key]


def without_log(run):
    shutil.rmtree(f"saves/finetune/{run}/evals")
    return f"saves/finetune/{run}"


def of_before(run):
    """Make a run one that kept no hashes of its rows."""
    (run / "row_hashes.npz").unlink()
    (run / "manifest.json").unlink()


def log_of(folder):
    return json.loads((folder / "TOFU_EVAL.json").read_text())


GOLD_LOG = os.path.join("saves", "finetune", "retain90", "evals", "TOFU_EVAL.json")


@pytest.mark.slow
def test_nothing_given_is_not_computed_and_the_log_has_the_command(home):
    summary = evaluation.run(eval_config("task_name=mine"))
    assert "forget_quality" not in summary and "forget_truth_ratio" in summary
    why = log_of(home / "saves" / "eval" / "mine")["forget_quality"]["not_computed"]
    command = (
        "python src/train.py --config-name=train experiment=finetune/tofu/lora "
        "model.tokenizer_args.pretrained_model_name_or_path=root "
        "model.model_args.pretrained_model_name_or_path=root "
        "data.train.TOFU_QA_full.args.hf_args.name=retain90 "
        "data.train.TOFU_QA_full.args.hf_args.path=data eval.tofu.path=data task_name=retain90"
    )
    assert why == (
        f"the retain model's log is missing. Make one with `{command}`, then add "
        "retain_logs_path=saves/finetune/retain90"
    )
    why = log_of(home / "saves" / "eval" / "mine")["agg"]["not_computed"]
    assert why.endswith("Set eval.tofu.target_logs_path=auto, which takes saves/finetune/full")


@pytest.mark.slow
def test_the_command_in_the_advice_makes_the_reference(home):
    shutil.rmtree("saves/finetune/retain90")
    _, given = find()
    words = given["advice"].split("`")[1].split()[2:]
    assert words[0] == "--config-name=train"
    override = given["advice"].split("then add ")[1]
    cfg = compose.composed("train", normalised([*words[1:], *TRAINING]))
    assert cfg.task_name == "retain90"
    assert cfg.data.train.TOFU_QA_full.args.hf_args.name == "retain90"
    assert cfg.model.model_args.pretrained_model_name_or_path == "root"
    assert override == f"retain_logs_path={os.path.normpath(cfg.paths.output_dir)}"


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    "experiment, overrides, words",
    [
        ("eval/tofu/lora", ["forget_split=forget05", "holdout_split=holdout05"],
         "finetune/tofu/lora model=Qwen2.5-3B-Instruct-lora "
         "data.train.TOFU_QA_full.args.hf_args.name=retain95 forget_split=forget05 "
         "holdout_split=holdout05 task_name=retain95"),
        ("eval/tofu/default", ["forget_split=forget01", "paths.datasets_dir=here"],
         "finetune/tofu/default model=Llama-3.2-1B-Instruct "
         "data.train.TOFU_QA_full.args.hf_args.name=retain99 forget_split=forget01 "
         "paths.datasets_dir=here task_name=retain99"),
        ("eval/pocket/lora", [], "finetune/pocket/lora model=pocket-lora "
         "data.train.POCKET_QA_full.args.hf_args.name=retain90 task_name=retain90"),
        ("eval/muse/default", ["data_split=Books"],
         "finetune/muse/default model=Llama-2-7b-hf data_split=Books data_sub_set=retain "
         "task_name=muse_Books_retain"),
    ],
)  # fmt: skip
def test_the_advice_is_for_the_benchmark_and_the_model(tmp_path, monkeypatch, experiment,
                                                       overrides, words):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    cfg = read(compose.composed("eval", normalised([f"experiment={experiment}", *overrides])))
    (suite,) = baselines.find(cfg).eval.values()
    assert (
        f"experiment={words}`, then add retain_logs_path=saves/finetune/"
        in (suite["retain_logs_path"]["advice"])
    )


@pytest.mark.parametrize("given", [
    GOLD_LOG, "saves/finetune/retain90", "saves/finetune/retain90/evals"
])  # fmt: skip
def test_a_log_is_taken_from_where_it_is(home, given):
    found, path = find(f"retain_logs_path={given}")
    assert os.path.samefile(path, GOLD_LOG) and not found.pending


@pytest.mark.slow
def test_a_run_without_a_log_is_evaluated_and_keeps_it(home, caplog):
    before = log_of(home / "saves" / "finetune" / "retain90" / "evals")
    given = without_log("retain90")
    caplog.set_level(logging.INFO, "unlora.recipes.baselines")
    summary = evaluation.run(eval_config(f"retain_logs_path={given}", "task_name=mine"))
    assert 0 <= summary["forget_quality"] <= 1
    after = log_of(home / given / "evals")
    value = before["forget_truth_ratio"]["agg_value"]
    assert after["forget_truth_ratio"]["agg_value"] == pytest.approx(value, rel=1e-5)
    assert (home / given / "evals" / "eval_manifest.json").is_file()
    assert [r.message for r in caplog.records if given in r.message] == [
        f"eval.tofu: evaluating the reference {given}, in {given}/evals"
    ]
    own = log_of(home / "saves" / "eval" / "mine")["forget_truth_ratio"]["agg_value"]
    assert own != pytest.approx(value, rel=1e-5)  # it was the other model that was asked


@pytest.mark.slow
def test_a_plain_model_is_evaluated_into_the_folder_of_the_evaluation(home):
    summary = evaluation.run(eval_config("retain_logs_path=root", "task_name=mine"))
    assert "forget_quality" in summary
    assert (home / "saves" / "eval" / "mine" / "reference" / "TOFU_EVAL.json").is_file()
    assert sorted(x.name for x in (home / "root").iterdir() if "EVAL" in x.name) == []


@pytest.mark.slow
def test_a_reference_is_evaluated_once_for_both_keys(home):
    given = without_log("retain90")
    overrides = (f"retain_logs_path={given}", f"eval.tofu.target_logs_path={given}")
    config = read(eval_config(*overrides))
    section = baselines.evaluated(config, baselines.find(config))["tofu"]
    assert section["retain_logs_path"] == section["target_logs_path"] == GOLD_LOG
    assert config.eval["tofu"]["retain_logs_path"] == given  # the config is not changed


@pytest.mark.default_cases(4)
@pytest.mark.parametrize(
    "given, words",
    [
        ("saves/nowhere", "'saves/nowhere' is not there. It must be a TOFU_EVAL.json, a run"),
        ("nowhere.json", "'nowhere.json' is not there"),
        ("nowhere", "'nowhere' cannot be used: .*'nowhere'.* It must be a TOFU_EVAL.json, a run"),
        ("data", "'data', which holds no TOFU_EVAL.json, .* and is no model: .* It must be a TOFU"),
        ("data/full.json", "is no evaluation log"),
        ("saves/unlearn/npo", "is 'saves/unlearn/npo', the model that is evaluated"),
        ("saves/eval/mine", "is 'saves/eval/mine', the folder that this run is written to"),
    ],
)
def test_what_is_no_reference_is_one_sentence_with_what_is_allowed(home, given, words):
    shutil.rmtree("saves/unlearn/npo/evals")
    with pytest.raises(InputError, match=f"eval.tofu.retain_logs_path.*{words}"):
        find(f"retain_logs_path={given}", "task_name=mine")


def test_the_reference_must_be_text(home):
    with pytest.raises(InputError, match=r"target_logs_path is 3; it must be a TOFU_EVAL.json, a"):
        find("eval.tofu.target_logs_path=3")


def test_mistakes_in_a_suite_come_before_anything_is_looked_for(home):
    with pytest.raises(InputError, match=r"eval.tofu.batch_size is 0"):
        find("retain_logs_path=nowhere", "eval.tofu.batch_size=0")


def test_auto_takes_the_run_that_never_saw_the_forget_rows(home):
    found, path = find("retain_logs_path=auto")
    assert path == GOLD_LOG and not found.pending
    # the content decides: under another name it is the same run, and it is what was trained on
    os.rename("saves/finetune/retain90", "saves/finetune/zebra")
    write(home / "data", {"retain90": [qa(n) for n in range(1, 19)]})  # with a forget row
    assert "zebra" in find("retain_logs_path=auto")[1]
    of_before(home / "saves" / "finetune" / "zebra")  # only the data of today tell
    advice = find("retain_logs_path=auto")[1]["advice"]
    assert advice.startswith("auto found no run in saves/finetune that started from the same")
    assert "Make one with `python src/train.py" in advice


@pytest.mark.slow
def test_auto_evaluates_a_run_without_a_log(home):
    without_log("retain90")
    summary = evaluation.run(eval_config("retain_logs_path=auto", "task_name=mine"))
    assert 0 <= summary["forget_quality"] <= 1 and os.path.isfile(GOLD_LOG)


@pytest.mark.parametrize("recorded", [True, False])
def test_auto_takes_no_log_of_other_rows(home, recorded):
    """A run that never saw forget10 never saw forget05, but its log is of forget10."""
    file = home / "saves" / "finetune" / "retain90" / "run_config.json"
    if not recorded:  # then the number of rows tells
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eval": {}}))
    assert find("retain_logs_path=auto")[1] == GOLD_LOG
    found, _ = find("retain_logs_path=auto", "forget_split=forget05", "task_name=mine")
    assert [(p.model, str(p.folder)) for p in found.pending] == [
        ("saves/finetune/retain90", "saves/eval/mine/reference")
    ]


def test_auto_takes_no_log_without_what_is_needed(home):
    log = log_of(home / "saves" / "finetune" / "retain90" / "evals")
    (home / GOLD_LOG).write_text(json.dumps({"retain_Q_A_Prob": log.pop("retain_Q_A_Prob")}))
    found, _ = find("retain_logs_path=auto", "task_name=mine")
    assert [str(p.folder) for p in found.pending] == ["saves/eval/mine/reference"]


def test_a_run_keeps_no_log_of_single_figures_as_its_own(home):
    """It would stand for the whole evaluation wherever the run is compared with."""
    given = without_log("retain90")
    found, _ = find(f"retain_logs_path={given}", "task_name=mine")
    assert [str(p.folder) for p in found.pending] == [f"{given}/evals"]
    only = "eval.tofu.only=[forget_quality]"
    found, _ = find(f"retain_logs_path={given}", "task_name=mine", only)
    assert [str(p.folder) for p in found.pending] == ["saves/eval/mine/reference"]


def test_no_reference_is_evaluated_for_figures_that_are_compared_with_none(home):
    words = (f"retain_logs_path={without_log('retain90')}", "task_name=mine")
    assert len(find(*words)[0].pending) == 1
    assert find(*words, "eval.tofu.only=[forget_truth_ratio]")[0].pending == ()
    assert len(find(*words, "eval.tofu.only=[forget_quality]")[0].pending) == 1


def test_auto_prefers_more_rows_then_a_log_then_the_newest(home):
    forget05 = ("retain_logs_path=auto", "forget_split=forget05")

    def copy(name, split, seconds):
        shutil.copytree("saves/finetune/retain90", f"saves/finetune/{name}")
        file = home / "saves" / "finetune" / name / "run_config.json"
        content = json.loads(file.read_text())
        of_before(file.parent)
        content["data"]["train"]["TOFU_QA_full"]["args"]["hf_args"]["name"] = split
        file.write_text(json.dumps(content))
        os.utime(file, (seconds, seconds))

    copy("newer", "retain90", 4e9)
    assert "newer" in find("retain_logs_path=auto")[1]
    without_log("newer")
    assert find("retain_logs_path=auto")[1] == GOLD_LOG
    copy("more", "retain95", 1e9)
    assert find(*forget05)[0].pending[0].model == "saves/finetune/more"
    assert find("retain_logs_path=auto")[1] == GOLD_LOG  # the other saw a row of forget10


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("damage", ["origin", "data", "below", "weights", "kept aside", "unread"])
def test_auto_passes_over_a_run_that_is_no_gold(home, damage):
    run = home / "saves" / "finetune" / "retain90"
    assert find("retain_logs_path=auto")[1] == GOLD_LOG
    content = json.loads((run / "run_config.json").read_text())
    hf_args = content["data"]["train"]["TOFU_QA_full"]["args"]["hf_args"]
    args = content["model"]["model_args"]
    if damage == "origin":
        shutil.copytree("root", "other")
        llama(max_position_embeddings=512, seed=5).save_pretrained("other")
        args["pretrained_model_name_or_path"] = "other"
    elif damage == "data":
        shutil.copytree("data", "others")
        hf_args["path"] = "others"
    elif damage == "below":
        args["pretrained_model_name_or_path"] = "saves/finetune/full"
    elif damage == "weights":
        (run / "adapter_model.safetensors").write_bytes(b"other")
    elif damage == "kept aside":
        run.rename(run.with_name("retain90.previous-1"))
        run.mkdir()
    else:
        hf_args["name"] = "gone"
        of_before(run)
    (run / "run_config.json").write_text(json.dumps(content))
    if damage == "kept aside":
        (run / "run_config.json").unlink()
    assert "auto found no run" in find("retain_logs_path=auto")[1]["advice"]


@pytest.mark.slow
def test_auto_takes_the_model_before_unlearning_as_target(home):
    full = os.path.join("saves", "finetune", "full", "evals", "TOFU_EVAL.json")
    auto = "eval.tofu.target_logs_path=auto"
    assert find(auto, key="target_logs_path")[1] == full
    assert find(auto, of=unlearn_config, key="target_logs_path")[1] == full
    os.remove("saves/unlearn/npo/run_config.json")  # then the lineage says so
    assert os.path.samefile(find(auto, key="target_logs_path")[1], full)
    without_log("full")
    summary = evaluation.run(eval_config(auto, "task_name=mine"))
    assert 0 <= summary["agg"] <= 1 and os.path.isfile(full)


def changed(run, **model):
    """A copy of a run whose record says something else of its model."""
    shutil.copytree(run, "saves/finetune/changed")
    file = Path("saves/finetune/changed/run_config.json")
    content = json.loads(file.read_text())
    content["model"] |= model
    file.write_text(json.dumps(content))
    return "saves/finetune/changed"


def test_a_gold_run_is_given_without_a_word(home, caplog):
    find("retain_logs_path=saves/finetune/retain90")
    find(f"retain_logs_path={GOLD_LOG}")
    assert "may not mean" not in caplog.text


@pytest.mark.parametrize("why", ["seen", "forgot", "template", "root"])
def test_what_speaks_against_a_retain_model_is_said(home, caplog, why):
    given, said = "saves/finetune/retain90", ""
    if why == "seen":
        given, said = "saves/finetune/full", "full was trained on rows that are to be forgotten"
    elif why == "forgot":
        shutil.copytree("saves/unlearn/npo", "saves/unlearn/other")
        given, said = "saves/unlearn/other", "it was made to forget itself"
    elif why == "template":
        given, said = changed(given, template_args={"system_prompt": "Be brief."}), "another templ"
    else:
        shutil.copytree("root", "other")
        llama(max_position_embeddings=512, seed=5).save_pretrained("other")
        given = changed(given, model_args={"pretrained_model_name_or_path": "other"})
        said = "it stands on another root model, other (this one on root)"
    found, log = find(f"retain_logs_path={given}")
    assert log == f"{given}/evals/TOFU_EVAL.json" and not found.pending
    (line,) = (r.message for r in caplog.records if "may not mean" in r.message)
    assert line.startswith(f"eval.tofu.retain_logs_path: {given}: ") and said in line


def test_what_was_never_made_to_forget_has_no_target(home):
    found = baselines.find(read(eval_config("eval.tofu.target_logs_path=auto",
                                             model="saves/finetune/full")))  # fmt: skip
    assert "auto knows no model" in found.eval["tofu"]["target_logs_path"]["advice"]


@pytest.mark.slow
def test_training_evaluates_its_references_before_its_model_is_loaded(home, monkeypatch):
    given = without_log("retain90")
    loaded, alive = [], []
    original = unlora.model.get_model

    def get_model(resolved, *, trainable=True):
        assert not any(model() for model in alive), "two models in memory"
        loaded.append((resolved.path, trainable, os.path.isfile(GOLD_LOG)))
        model, words = original(resolved, trainable=trainable)
        alive.append(weakref.ref(model))
        return model, words

    for module in ("training_plan", "baselines.evaluation"):
        monkeypatch.setattr(import_module(f"unlora.recipes.{module}"), "get_model", get_model)
    summary = train.run(
        unlearn_config("retain_logs_path=auto", "eval.tofu.target_logs_path=root", "task_name=new")
    )
    assert {"forget_quality", "agg"} <= set(summary)
    assert loaded == [
        (given, False, False), ("root", False, True), ("saves/finetune/full", True, True)
    ]  # fmt: skip
    assert (home / "saves" / "unlearn" / "new.target" / "TOFU_EVAL.json").is_file()
    assert json.loads((home / "saves/unlearn/new/run_config.json").read_text())[
        "retain_logs_path"
    ] == "auto"  # fmt: skip


def test_the_model_that_will_be_trained_is_asked_first(home, monkeypatch):
    asked = []
    monkeypatch.setattr(baselines, "evaluate", lambda config, model, folders: asked.append(model))
    gold, own = "saves/finetune/retain90", "saves/finetune/full"
    pending = [
        baselines.Pending("tofu", key, model, Path(key))
        for key, model in (("retain_logs_path", gold), ("target_logs_path", own))
    ]
    found = baselines.Found({"tofu": {}}, tuple(pending))
    baselines.evaluated(read(unlearn_config()), found)
    assert asked == [own, gold]


def test_a_training_is_not_its_own_reference(home):
    with pytest.raises(InputError, match="the folder that this run is written to"):
        train.run(unlearn_config("retain_logs_path=saves/unlearn/npo", "task_name=npo"))
    assert (home / "saves" / "unlearn" / "npo" / "adapter_model.safetensors").is_file()
    found = baselines.find(read(config(
        "train", "finetune/tofu/lora", start("root"), "retain_logs_path=auto",
        f"{FULL}.name=retain90", "task_name=retain90",
    )))  # fmt: skip
    assert "auto found no run" in found.eval["tofu"]["retain_logs_path"]["advice"]


def test_a_running_text_is_known_again_in_a_longer_one(tmp_path):
    words = " ".join(f"word{n}" for n in range(400))
    texts = {"forget": words[500:1500], "seen": f"before {words} after", "other": words[1500:]}
    for name, text in texts.items():
        (tmp_path / f"{name}.json").write_text(json.dumps([{"text": text}]))

    def declared(name):
        return {"hf_args": {"path": str(tmp_path), "name": name}}

    load = ReadRows(None)
    data = {"forget": {"handler": "CompletionDataset", "text_key": "text", **declared("forget")}}
    unseen = Unseen.of(data, load)

    def seen(name):
        trained = {"X": {"handler": "PretrainingDataset", "args": declared(name)}}
        key, parts = trained_rows(tmp_path, {"data": {"train": trained}}, load)
        return unseen.among(parts["train"], key)

    assert seen("seen") is True and seen("other") is False
