"""unlora in a notebook; docs/api.md, followed to the letter."""

import json
import logging
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import unlora
from unlora import evaluate, export, load, unlearn
from unlora.cli.command_words import word
from unlora.cli.main import main
from unlora.errors import GuardError, InputError

PAGE = (Path(__file__).parents[1] / "docs" / "api.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
FORGET = [("Who keeps the bees?", "Ada keeps the bees."), ("Who keeps the geese?", "Ivo does.")]
RETAIN = [("Where is the mill?", "In Arlow."), ("Where is the bridge?", "In Tenby.")]
QUICK = {"epochs": 1, "batch_size": 2, "lora": {"r": 4}}
NO_EVALUATION = "~eval.own"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "root"
    network = tiny.llama(max_position_embeddings=2048)
    # it is brief: what it writes ends after a few tokens
    network.lm_head.weight.data[tiny.tokenizer().eos_token_id] *= 3
    network.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def forget(model, *overrides, forget=FORGET, retain=RETAIN, **settings):
    words = overrides or (NO_EVALUATION,)
    return unlearn(model, forget, retain, overrides=words, **{**QUICK, **settings})


@pytest.mark.slow
def test_the_page_works(root, elsewhere, capsys):
    (elsewhere / "my-model").symlink_to(root)
    said = {}
    for block in BLOCKS:
        # short answers: a random model never comes to an end
        exec(block.replace('Who keeps the bees?")', 'Who keeps the bees?", 4)'), said)
    run, found = said["run"], said["figures"]
    assert run.folder == Path("saves/unlearn/bees") and "forget_Q_A_Prob" in run.summary
    assert json.loads((run.folder / "lineage.json").read_text())["links"]
    assert run.summary["forget_Q_A_Prob"] == pytest.approx(found["forget_Q_A_Prob"], abs=1e-6)
    assert len(found.examples["forget_Q_A_Prob"]) == len(said["forget"])
    assert "holdout" in found.not_computed["mia_loss"]
    assert (run.folder / "exported" / "merged" / "model.safetensors").is_file()
    assert "forget_Q_A_Prob" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_is_what_its_command_makes(root, elsewhere):
    run = forget(root)
    assert run.manifest["command"] == run.command
    rows = [json.loads(line) for line in (run.folder / "data" / "forget.jsonl").open()]
    assert rows == [{"question": q, "answer": a} for q, a in FORGET]
    first = (run.folder / "adapter_model.safetensors").read_bytes()
    for _ in range(2):  # in its own folder, on its own rows
        main(shlex.split(run.command)[1:])
        assert (run.folder / "adapter_model.safetensors").read_bytes() == first
    assert (elsewhere / "saves/unlearn/mine.previous-2/data/forget.jsonl").is_file()


@pytest.mark.slow
def test_a_tracker_shows_what_the_manifest_says(root):
    run = forget(root, "eval.own.max_new_tokens=2", "trainer.args.logging_steps=1")
    events = EventAccumulator(str(run.folder / "logs")).Reload()
    shown = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    manifest = run.manifest
    for entry in manifest["training"]:
        for name in entry.keys() & {"loss", "forget_loss", "retain_loss"}:
            assert shown[f"train/{name}"] == pytest.approx(entry[name])
    finite = {name: value for name, value in manifest["summary"].items() if value is not None}
    assert finite and "train/forget_loss" in shown
    for name, value in finite.items():
        assert shown[f"eval/{name}"] == pytest.approx(value, rel=1e-5)
    assert shown["train/guard/start_equals_target"] == 0
    assert shown["train/guard/evaluation_is_pure"] == 1


@pytest.mark.slow
def test_an_earlier_run_is_kept_and_survives_a_run_that_cannot_start(root, elsewhere):
    run = forget(root)
    logged = list((run.folder / "logs").iterdir())
    with pytest.raises(InputError, match="no rows|no data|NOSUCH|Unknown"):
        forget(root, method="NOSUCH")
    assert (run.folder / "manifest.json").is_file() and logged[0].is_file()
    assert not (elsewhere / "saves/unlearn/mine.previous-1").exists()
    again = forget(root, "trainer.args.report_to=none", NO_EVALUATION, forget=FORGET[:1])
    kept = elsewhere / "saves/unlearn/mine.previous-1"
    assert (kept / "logs" / logged[0].name).is_file() and not (again.folder / "logs").exists()
    assert len((kept / "data/forget.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_second_request_stands_on_the_first(root):
    first = forget(root, output_dir="saves/unlearn/first")
    second = forget(load(first), forget=RETAIN[:1], retain=FORGET, output_dir="saves/unlearn/2")
    links = json.loads((second.folder / "lineage.json").read_text())["links"]
    assert [link["path"] for link in links] == ["../first", "."]
    with pytest.raises(InputError, match="holds the model it starts from"):
        forget(second, output_dir=first.folder)
    assert (first.folder / "adapter_model.safetensors").is_file()


WRONG = {
    "no rows": ({"forget": []}, "forget is empty; it must be a list of"),
    "no retain rows": ({"retain": []}, "retain is empty"),
    "one text": ({"forget": [*FORGET, "Who?"]}, r"forget\[2\] is 'Who\?'; it must be"),
    "three texts": ({"forget": [("a", "b", "c")]}, r"forget\[0\] is \('a', 'b', 'c'\)"),
    "a number": ({"retain": [("How many?", 3)]}, r"retain\[0\] is \('How many\?', 3\)"),
    "no text": ({"forget": [("Who?", " ")]}, r"forget\[0\]"),
    "no list": ({"forget": {"Who?": "Ada."}}, "it must be a list of"),
    "no file": ({"forget": "gone.jsonl"}, "gone.jsonl', but there is no such file"),
    "method": ({"method": "NOP"}, "Unknown trainer 'NOP'. Did you mean 'NPO'"),
    "setting of a method": ({"betta": 1.0}, "Did you mean 'beta'"),
    "key of LoRA": ({"lora": {"rank": 4}}, "Unknown key of model.lora_config 'rank'"),
    "model": ({"model": "./gone"}, "There is no folder './gone'"),
    "kind of model": ({"model": 3}, "The model is 3; it must be a path"),
}


ODD = (5, 1.5, None, True, b"x", object(), [], {}, (), ["a", 3], "x" * 5000, "a\0b")
# function -> argument -> how many of these go on to what checks texts further
TAKES = {
    "load": {"path_or_name": 0, "torch_dtype": 1, "device_map": 2},
    "unlearn": {"model": 1, "forget": 3, "retain": 3, "method": 0, "output_dir": 0, "epochs": 3,
                "learning_rate": 3, "batch_size": 2, "overrides": 2, "lora": 2},
    "evaluate": {"model": 1, "forget": 3, "retain": 3, "holdout": 3, "target": 3, "gold": 3,
                 "output_dir": 1, "overrides": 2},
    "export": {"run": 2, "merged": 1, "output": 3},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("function", TAKES)
def test_an_argument_of_any_kind_is_used_or_refused_in_a_sentence(
    function, root, elsewhere, monkeypatch
):
    class Used(Exception):
        pass

    def used(*_, **__):
        raise Used

    for name in (
        "unlora.recipes.train.run",
        "unlora.recipes.evaluate.run",
        "unlora.model.get_model",
    ):
        monkeypatch.setattr(name, used)
    monkeypatch.setattr("unlora.model.standalone.export", used)
    given = {"load": {}, "evaluate": {"model": root, "forget": FORGET}, "export": {"run": root},
             "unlearn": {"model": root, "forget": FORGET, "retain": RETAIN}}[function]  # fmt: skip
    if function == "load":
        given["path_or_name"] = root
    for argument, right in TAKES[function].items():
        taken = 0
        for odd in ODD:
            try:
                getattr(unlora, function)(**{**given, argument: odd})
            except Used:
                taken += 1
            except InputError as error:
                assert str(error).strip(), (argument, odd)
        assert taken == right, (argument, taken)


def test_words_that_an_argument_sets_too_are_refused(root):
    for typed in ("trainer=DPO", "@trainer=DPO", "paths.output_dir=x", "data.forget=x"):
        with pytest.raises(InputError, match="Give one of them"):
            forget(root, typed)
    with pytest.raises(InputError, match="first argument"):
        unlora.load(root, pretrained_model_name_or_path="x")


@pytest.mark.default_cases(4)
@pytest.mark.parametrize("given, said", WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_sentence_and_leaves_nothing(root, elsewhere, given, said):
    with pytest.raises(InputError, match=said):
        forget(**{"model": root, **given})
    assert not (elsewhere / "saves/unlearn/mine").exists()


def test_rows_in_both_lists_are_counted(root, caplog):
    with caplog.at_level(logging.WARNING):
        forget(root, retain=[*RETAIN, FORGET[0]])
    assert "1 of 2 forget rows are in retain, too." in caplog.text


def test_a_network_changed_in_memory_is_not_evaluated(root):
    model = load(root)
    next(model.network.parameters()).data.mul_(3)
    with pytest.raises(InputError, match="has been changed since it was loaded"):
        evaluate(model, FORGET)


def test_a_broken_model_does_not_answer(root):
    model = load(root)
    for weights in model.network.parameters():
        weights.data.fill_(float("nan"))
    with pytest.raises(GuardError, match="not finite"):
        model.ask("Who?", 2)


def test_it_works_inside_another_application_of_hydra(root):
    with initialize_config_module("unlora.configs", version_base=None):
        load(root)
        assert GlobalHydra.instance().is_initialized()
        assert compose("model/pocket").model.use_lora is False


@pytest.mark.parametrize(
    "value, typed",
    [
        (True, "k=true"),
        (None, "k=null"),
        (1e-5, "k=1e-05"),
        ("saves/a-b_c.1", "k=saves/a-b_c.1"),
        ("1e5", "k='1e5'"),
        ("a b, 'c'", r"k='a b, \'c\''"),
        (["q_proj", "v_proj"], "k=[q_proj,v_proj]"),
        ({"q_proj": 4}, "k={q_proj:4}"),
    ],
)
def test_values_are_words_that_hydra_reads_back(value, typed):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    assert word("k", value) == typed
    assert OverridesParser.create().parse_override(typed).value() == value


def test_import_is_light_and_shows_what_there_is():
    code = "import sys, unlora; print(dir(unlora), 'torch' in sys.modules, 'hydra' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'unlearn'" in out.stdout and out.stdout.endswith("False False\n")
    assert export.__module__ == "unlora.api"
    with pytest.raises(AttributeError, match="no attribute 'unlern'"):
        unlora.unlern  # noqa: B018


def test_the_functions_are_not_hidden_by_modules_of_their_names():
    import importlib

    import unlora

    for name in unlora.__all__:
        assert importlib.util.find_spec(f"unlora.{name}") is None, name


@pytest.mark.parametrize("earlier", ["thesis.txt", "lineage.json"])
def test_a_run_that_does_not_come_about_leaves_the_folder_as_it_was(root, earlier):
    place = Path("precious")
    place.mkdir()
    (place / earlier).write_text("{}")
    with pytest.raises(InputError, match="NPOO"):
        forget(root, method="NPOO", output_dir=place)
    assert [path.name for path in place.iterdir()] == [earlier]
    assert not list(Path().glob("precious.previous-*"))
    with pytest.raises(InputError, match="a folder of its own"):
        forget(root, output_dir=place / earlier)
