"""What is run, and what is not run again."""

from dataclasses import replace
from pathlib import Path

import pytest
from pretended import METHODS, here, study

from unlora.studies import scheduler, stage_run
from unlora.studies.config import read
from unlora.studies.stages import plan
from unlora.trainer.checkpoints import write_record

pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture
def go(pretended):
    """Run a study; the stages that were run for it."""

    def run(**changes):
        pretended.clear()
        folder = Path("home")
        done = scheduler.run(plan(read(study(seeds=[0], **changes)), folder), folder, here)
        assert done.ran == pretended
        return done

    return run


def go_failing(go, methods):
    """The same where some stages fail before they run."""
    folder = Path("home")
    return scheduler.run(plan(read(study(seeds=[0], methods=methods)), folder), folder, here)


@pytest.mark.slow
def test_a_finished_study_runs_nothing(go):
    assert len(go().ran) == 8
    again = go()
    assert again.ran == [] and len(again.finished) == 8


@pytest.mark.slow
@pytest.mark.budget(3)
def test_what_is_new_runs_after_what_it_needs(go):
    ran = go().ran
    assert set(ran[:2]) == {"seed0-gold-train", "seed0-target-train"}
    assert ran.index("seed0-gold-eval") < ran.index("seed0-target-eval")
    assert ran.index("seed0-target-eval") < ran.index("seed0-NPO-eval")


@pytest.mark.slow
def test_a_changed_setting_of_one_method_runs_its_stages_alone(go):
    go()
    changed = {**METHODS, "NPO": ["trainer=NPO", "trainer.method_args.beta=0.5"]}
    assert go(methods=changed).ran == ["seed0-NPO-train", "seed0-NPO-eval"]


@pytest.mark.slow
def test_a_changed_target_runs_all_that_came_from_it_and_not_gold(go):
    go()
    target = [*study()["target"], "trainer.args.learning_rate=0.5"]
    ran = go(target=target).ran
    assert len(ran) == 6 and not any("gold" in name for name in ran)


@pytest.mark.slow
def test_a_changed_question_trains_nothing(go):
    go()
    ran = go(unlearn=[*study()["unlearn"], "eval.tofu.max_new_tokens=5"]).ran
    assert sorted(ran) == sorted(f"seed0-{r}-eval" for r in ("gold", "target", "NPO", "GradDiff"))


@pytest.mark.slow
def test_what_is_only_shown_runs_nothing(go):
    go()
    assert go(target=[*study()["target"], "trainer.args.logging_steps=1"]).ran == []


@pytest.mark.slow
def test_a_new_model_in_the_old_place_runs_everything(go):
    go()
    config = Path("root/config.json")
    config.write_text(config.read_text().replace("{", '{"changed": true,', 1))
    assert len(go().ran) == 8


@pytest.mark.slow
def test_a_damaged_result_is_made_again(go):
    go()
    Path("home/seed0/NPO/model.safetensors").write_text("damaged")
    assert go().ran == ["seed0-NPO-train"]  # it came out as before, so its evaluation stands
    Path("home/seed0/NPO/evals/TOFU_EVAL.json").unlink()
    assert go().ran == ["seed0-NPO-eval"]


@pytest.mark.slow
def test_what_waits_for_a_stage_that_failed_is_left_out_and_the_rest_goes_on(go, monkeypatch):
    pretended = stage_run._run

    def failing(stage, key):
        pretended(stage, key)
        if stage.run == "NPO":
            raise ValueError("no luck")

    monkeypatch.setattr(stage_run, "_run", failing)
    done = go()
    assert done.failed == {"seed0-NPO-train": "ValueError: no luck"}
    assert "seed0-NPO-eval" not in done.ran and "seed0-GradDiff-eval" in done.finished
    monkeypatch.setattr(stage_run, "_run", pretended)
    assert go().ran == ["seed0-NPO-train", "seed0-NPO-eval"]


def test_two_at_the_same_stage_do_it_once(pretended):
    folder = Path("home")
    stage = plan(read(study(seeds=[0])), folder)[0]
    record = stage_run.Record.of(stage, folder)
    stage_run.do(stage, record)
    stage_run.do(stage, record)
    assert pretended == [stage.name]


@pytest.mark.slow
def test_an_interrupted_training_goes_on_and_one_with_other_settings_begins_anew(
    folder, monkeypatch
):
    resumed = []

    def train(config, *, evaluate):
        place = Path(config["paths"]["output_dir"])
        resumed.append(config["trainer"]["args"].get("resume_from_checkpoint"))
        (place / "checkpoint-5").mkdir(exist_ok=True)
        state = place / "checkpoint-5" / "trainer_state.json"
        state.write_text('{"global_step": 5}')
        write_record(state.parent, state, {})
        raise ValueError("killed")

    monkeypatch.setattr("unlora.recipes.train.run", train)
    stage = plan(read(study(seeds=[0])), folder)[0]
    other = replace(stage, overrides=(*stage.overrides, "trainer.args.learning_rate=0.5"))
    for one in (stage, stage, other, other, stage):
        stage_run.do(one, stage_run.Record.of(one, folder))
    assert resumed == [None, True, None, True, None]
    kept = sorted(path.name for path in (folder / "seed0").iterdir())
    assert kept == ["gold", "gold.previous-1", "gold.previous-2"]


@pytest.mark.slow
def test_what_could_not_be_planned_fails_alone(go):
    missing = "data.forget.POCKET_QA_forget.args.hf_args.path=nofile.jsonl"
    done = go_failing(go, {**METHODS, "KL": ["trainer=GradDiff", missing]})
    assert (
        list(done.failed) == ["seed0-KL-train"] and "nofile.jsonl" in done.failed["seed0-KL-train"]
    )
    assert "seed0-NPO-eval" in done.finished


@pytest.mark.slow
def test_a_launcher_that_breaks_down_leaves_what_is_finished(pretended):
    folder = Path("home")

    def breaking(stages):
        here(stages[:1])
        raise RuntimeError("a worker was killed")

    done = scheduler.run(plan(read(study(seeds=[0])), folder), folder, breaking)
    assert done.finished == {"seed0-gold-train", "seed0-gold-eval"}
    assert "its process was lost (RuntimeError)" in done.failed["seed0-target-train"]


@pytest.mark.slow
def test_a_study_under_another_name_is_the_same_study(go):
    go()
    Path("home").rename("other")
    folder = Path("other").resolve()
    again = scheduler.run(plan(read(study(seeds=[0])), folder), folder, here)
    assert again.ran == [] and len(again.finished) == 8


@pytest.mark.slow
def test_a_damaged_record_is_not_believed(go):
    go()
    Path("home/stages/seed0-GradDiff-eval.json").write_text('{"state": ')
    assert go().ran == ["seed0-GradDiff-eval"]
