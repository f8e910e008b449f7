"""A study on questions and answers of one's own: every stage has a config before anything runs."""

import json
from pathlib import Path

import pytest
from pretended import METHODS, study

from unlora.cli.compose import composed
from unlora.cli.main import main
from unlora.config import read as checked
from unlora.errors import InputError
from unlora.studies import dry_run, stage_fingerprints
from unlora.studies.config import read
from unlora.studies.stages import plan

FILES = ["data.forget=forget.jsonl", "data.retain=retain.jsonl"]
UNLEARN = ["experiment=unlearn/own/lora", *FILES]
FINETUNE = ["experiment=finetune/own/lora", "model=./root"]


@pytest.fixture
def files(folder):
    """Two files of rows beside the tiny model."""
    for name, number in (("forget", 3), ("retain", 4), ("holdout", 2)):
        rows = [{"question": f"Who is {name} {n}?", "answer": f"It is {n}."} for n in range(number)]
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def stages_of(**changes):
    own = {
        "seeds": [0],
        "target": [*FINETUNE, "data.train=['forget.jsonl','retain.jsonl']"],
        "gold": [*FINETUNE, "data.train=retain.jsonl"],
        "unlearn": UNLEARN,
    }
    return plan(read(study(**(own | changes))), Path("home"))


@pytest.mark.slow
@pytest.mark.parametrize("unlearn", [UNLEARN, [*UNLEARN, "model=./root"]], ids=["", "model named"])
def test_every_stage_has_a_config(files, unlearn):
    stages = {stage.name: stage for stage in stages_of(unlearn=unlearn)}
    assert len(stages) == 2 * (2 + len(METHODS))
    for stage in stages.values():
        config = checked(stage_fingerprints.config_of(stage))
        trains = "unlearn" if stage.config == "unlearn" else "finetune"
        assert config.mode == ("eval" if stage.kind == "eval" else trains)
    target = checked(stage_fingerprints.config_of(stages["seed0-target-train"]))
    assert sorted(target.data["train"]) == ["own", "own1"]
    evaluation = stage_fingerprints.config_of(stages["seed0-NPO-eval"])
    assert evaluation["model"]["model_args"]["pretrained_model_name_or_path"] == "home/seed0/NPO"
    assert len(stage_fingerprints.key(stages["seed0-target-train"])) == 64


@pytest.mark.slow
def test_rows_count_by_their_content_and_a_data_set_without_a_path_has_none(files):
    there = stages_of(target="root", gold=None)[0]
    before = stage_fingerprints.key(there)
    Path("forget.jsonl").write_text('{"question": "Who?", "answer": "Ada."}\n')
    stage_fingerprints._hash_of_rows.cache_clear()
    assert stage_fingerprints.key(there) != before
    found = stage_fingerprints._hub_args(
        {
            "a": {"hf_args": {"path": None}},
            "my_hf_args": 3,
            "other_hf_args": {"path": "x"},
            "hf_args": "text",
            "b": {"few_shot_dataset_hf_args": {"path": "y"}, "hf_args": {"path": "z"}},
        }
    )
    assert sorted(one["path"] for one in found) == ["y", "z"]


@pytest.mark.slow
def test_what_is_wrong_in_an_evaluation_is_said_before_anything_is_trained(files):
    for words, said in (
        (["eval.own.max_new_tokens=0"], "max_new_tokens is 0"),
        (["eval.own.metrics.x.handler=nix"], "nix"),
    ):
        with pytest.raises(InputError, match=f"evaluate gold.*{said}"):
            dry_run.check_evaluations(stages_of(unlearn=[*UNLEARN, *words]))
    missing = [*UNLEARN, "data.holdout=gone.jsonl"]  # of the evaluation after each unlearning
    with pytest.raises(InputError, match=r"train .*data.holdout is 'gone.jsonl', but there is no"):
        dry_run.check_evaluations(stages_of(unlearn=missing))
    dry_run.check_evaluations(stages_of())


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, said",
    [
        ("forget", r"train target.*data.train.*no column 'question'.*question_key"),
        ("retain", r"train gold.*data.train.*no column 'question'.*question_key"),
        ("holdout", r"(train NPO|evaluate) .*eval.own.data.*column 'question'.*question_key"),
    ],
)
def test_rows_without_their_columns_are_said_before_anything_is_trained(files, file, said):
    holdout = [*UNLEARN, "data.holdout=holdout.jsonl"]
    dry_run.check_evaluations(stages_of(unlearn=holdout))
    Path(f"{file}.jsonl").write_text('{"frage": "Who is it?", "answer": "Ada."}\n')
    with pytest.raises(InputError, match=said):
        dry_run.check_evaluations(stages_of(unlearn=holdout))


@pytest.mark.slow
def test_trainings_that_differ_in_their_seed_are_estimated_once(files, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "unlora.trainer.memory_estimate.estimate", lambda config: asked.append(1) or 1
    )
    sizes = dry_run.Sizes()
    for seed in (0, 1, 2):
        for stage in stages_of(seeds=[seed])[:3:2]:  # gold and target
            sizes.of(checked(dry_run._from_the_start(read(study()), stage)))
    assert len(asked) == 2


@pytest.mark.slow
def test_the_shipped_study_plans_what_its_page_says(files, capsys):
    words = ["experiment=study/own/lora", "model=root", *FILES, "seeds=[0]"]
    with pytest.raises(SystemExit) as ended:
        main(["study", *words, "methods.NPO=['trainer=NPOO']", "--dry-run"])
    assert ended.value.code == 2 and "NPO" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["study", "experiment=study/pocket/lora", "model=root", "--dry-run"])
    assert "no list of this study uses it" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("role", ["target", "gold"])
def test_how_long_target_and_gold_of_the_shipped_study_learn_is_said_once(files, role):
    words = ["experiment=study/own/lora", "model=root", *FILES, "seeds=[0]"]

    def arguments(*more):
        planned = plan(read(composed("study", [*words, *more])), Path())
        stages = {stage.run: stage for stage in planned if stage.kind == "train"}
        args = checked(stage_fingerprints.config_of(stages[role])).trainer.args
        return args["num_train_epochs"], args["learning_rate"]

    assert arguments() == (3, 2e-4)
    in_float32 = [*words, "model.torch_dtype=float32"]
    for stage in plan(read(composed("study", in_float32)), Path()):
        if stage.kind == "train":  # an evaluation takes the dtype of the run
            assert (
                checked(stage_fingerprints.config_of(stage)).model.model_args["torch_dtype"]
                == "float32"
            )
    longer = arguments("finetune.num_train_epochs=10", "finetune.learning_rate=1e-3")
    assert longer == (10, 1e-3)
    with pytest.raises(InputError, match=r"num_train_epochs is 0"):
        arguments("finetune.num_train_epochs=0")


@pytest.mark.slow
def test_the_shipped_study_runs_to_its_page(files, capfd):
    small = ["trainer.args.max_steps=1", "model.lora_config.r=2", "eval.own.max_new_tokens=2"]
    words = ["experiment=study/own/lora", "model=root", *FILES, "data.holdout=holdout.jsonl"]
    lists = (Path(__file__).parents[2] / "configs/experiment/study/own/lora.yaml").read_text()
    own = Path("mine/experiment/study/mine.yaml")
    own.parent.mkdir(parents=True)
    own.write_text(lists.replace("  - experiment=finetune/own/lora", "\n".join(
        ["  - experiment=finetune/own/lora", *(f"  - {word}" for word in small[:2])])
    ).replace("  - experiment=unlearn/own/lora", "\n".join(
        ["  - experiment=unlearn/own/lora", *(f"  - {word}" for word in small)]
    )))  # fmt: skip
    words[0] = "experiment=study/mine"
    one = ["seeds=[0]", "~methods.GradDiff", "~methods.SimNPO"]
    main(["study", "--config-dir=mine", *words, *one])
    assert Path("saves/study/own/report.html").is_file()
    assert "6 stages were run" in capfd.readouterr().out
