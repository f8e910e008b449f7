from pathlib import Path

import pytest
from pretended import study

from unlora.errors import InputError
from unlora.studies.config import read
from unlora.studies.stages import Stage, plan, variants


def planned(**changes):
    return {stage.name: stage for stage in plan(read(study(**changes)), Path("home"))}


def test_every_model_is_trained_and_evaluated_for_every_seed():
    stages = planned()
    assert len(stages) == 2 * 2 * 4
    npo, asked = stages["seed1-NPO-train"], stages["seed1-NPO-eval"]
    assert npo.needs == ("seed1-target-train",)
    assert npo.model == str(Path("home/seed1/target"))
    assert set(asked.needs) == {"seed1-gold-eval", "seed1-target-eval", "seed1-NPO-train"}
    assert asked.retain_log == str(Path("home/seed1/gold/evals"))
    assert asked.target_log == str(Path("home/seed1/target/evals"))
    assert stages["seed0-gold-eval"].needs == ("seed0-gold-train",)
    assert set(stages["seed0-target-eval"].needs) == {"seed0-gold-eval", "seed0-target-train"}


def test_every_stage_comes_after_those_it_needs():
    seen = set()
    for name, stage in planned().items():
        assert seen.issuperset(stage.needs)
        seen.add(name)


def test_a_model_that_is_there_already_is_evaluated_once_and_not_trained():
    stages = planned(target="owner/target", gold=None)
    assert [name for name in stages if "target" in name] == ["given-target-eval"]
    assert stages["given-target-eval"].model == "owner/target"
    assert stages["seed1-NPO-train"].model == "owner/target"
    assert stages["seed1-NPO-train"].needs == ()
    assert stages["seed1-NPO-eval"].retain_log is None


def test_a_model_that_is_there_is_compared_with_the_gold_of_each_seed():
    stages = planned(target="owner/target")
    assert {"seed0-target-eval", "seed1-target-eval"} <= set(stages)
    assert stages["seed1-target-eval"].retain_log == str(Path("home/seed1/gold/evals"))
    assert stages["seed1-target-eval"].folder != stages["seed0-target-eval"].folder
    assert "seed0-target-train" not in stages and stages["seed1-NPO-train"].needs == ()


@pytest.mark.slow
def test_training_that_evaluates_on_its_way_waits_for_the_log_of_gold():
    panels = {"NPO": ["trainer=NPO", "trainer.args.eval_strategy=epoch"]}
    stage = planned(methods=panels)["seed0-NPO-train"]
    assert set(stage.needs) == {"seed0-target-train", "seed0-gold-eval"}
    assert stage.retain_log == str(Path("home/seed0/gold/evals"))


def test_a_key_with_several_values_is_one_method_for_each():
    found = variants({"NPO": ["trainer=NPO", "a.beta=0.1,0.5", "b.alpha=1,2"], "KL": None})
    assert list(found) == [
        "NPO,beta=0.1,alpha=1", "NPO,beta=0.1,alpha=2",
        "NPO,beta=0.5,alpha=1", "NPO,beta=0.5,alpha=2", "KL",
    ]  # fmt: skip
    assert found["NPO,beta=0.5,alpha=1"] == ("trainer=NPO", "a.beta=0.5", "b.alpha=1")


def test_two_methods_of_one_name_are_refused():
    with pytest.raises(InputError, match="would be called 'NPO,beta=1'"):
        variants({"NPO": ["a.beta=1,2"], "NPO,beta=1": ["trainer=NPO"]})


def test_an_override_that_cannot_be_read_is_refused():
    with pytest.raises(InputError, match="cannot be read: 'trainer=\\['"):
        variants({"NPO": ["trainer=["]})


def test_a_stage_survives_json():
    stage = planned()["seed1-NPO-eval"]
    assert Stage.from_dict(stage.as_dict()) == stage
