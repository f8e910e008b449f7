"""What a result depends on is in its key."""

from importlib import metadata
from pathlib import Path

import pytest
from pretended import study

from unlora.studies.config import read
from unlora.studies.stage_fingerprints import _suite, key
from unlora.studies.stages import plan

pytestmark = pytest.mark.usefixtures("folder")


def keys(which, **changes):
    stages = {s.name: s for s in plan(read(study(seeds=[0], **changes)), Path("home"))}
    return key(stages[which])


def target(*more):
    return [*study()["target"], *more]


@pytest.mark.slow
def test_a_setting_that_is_learnt_changes_it_and_one_that_is_shown_does_not():
    before = keys("seed0-target-train")
    assert keys("seed0-target-train", target=target("trainer.args.learning_rate=0.5")) != before
    assert keys("seed0-target-train", target=target("model.lora_config.r=2")) != before
    assert keys("seed0-target-train", target=target("global_batch_size=2")) != before
    assert keys("seed0-target-train", target=target("trainer.args.logging_steps=7")) == before
    assert keys("seed0-target-train", target=target("trainer.args.save_steps=7")) == before


@pytest.mark.slow
def test_where_the_best_checkpoint_is_kept_all_that_chooses_it_counts():
    best = (
        "trainer.args.load_best_model_at_end=true", "trainer.args.eval_strategy=steps",
        "trainer.args.metric_for_best_model=forget_Q_A_Prob",
    )  # fmt: skip
    before = keys("seed0-target-train", target=target(*best), gold=None)
    for more in ("trainer.args.save_steps=7", "eval.tofu.panel_rows=3"):
        assert keys("seed0-target-train", target=target(*best, more), gold=None) != before


@pytest.mark.slow
def test_the_tokenizer_counts_by_its_content():
    before = keys("seed0-target-train")
    file = Path("root/chat_template.jinja")
    file.write_text("{# another #}" + (file.read_text() if file.exists() else ""))
    assert keys("seed0-target-train") != before


@pytest.mark.slow
def test_a_retain_log_of_ones_own_counts_by_its_content():
    asked = [*study()["unlearn"], "retain_logs_path=log.json"]
    changes = {"gold": None, "target": "root", "unlearn": asked}
    Path("log.json").write_text('{"x": {"agg_value": 1}}')
    before = keys("given-target-eval", **changes)
    assert keys("given-target-eval", **changes) == before
    Path("log.json").write_text('{"x": {"agg_value": 2}}')
    assert keys("given-target-eval", **changes) != before


@pytest.mark.slow
def test_how_weights_are_quantised_counts_and_by_which_version(monkeypatch):
    version, installed = metadata.version, ["0.50.2"]

    def pretended(name):
        return installed[0] if name == "bitsandbytes" else version(name)

    monkeypatch.setattr(metadata, "version", pretended)
    for stage, given in (("seed0-target-train", {}), ("given-target-eval", {"target": "root"})):

        def found(*more, stage=stage, given=given):
            changes = {"gold": None, "unlearn": [*study()["unlearn"], *more]}
            return keys(stage, **{"target": target(*more), **changes, **given})

        made = {found(), found("model.quantisation=nf4"), found("model.quantisation=int8")}
        raw = "model.model_args.quantization_config.load_in_4bit=true"
        if not given:
            made.add(found(raw))
        installed[0] = "0.50.2"
        assert found("model.quantisation=nf4") in made
        installed[0] = "0.51.0"
        assert found("model.quantisation=nf4") not in made and found() in made
        assert len(made) == 3 + (not given)
        installed[0] = "0.50.2"


def test_figures_that_are_asked_alone_count_and_a_study_of_before_there_was_that_key_is_the_same():
    suite = {"handler": "TOFUEvaluator", "metrics": {}, "data": {}}
    assert _suite({**suite, "only": None}, None) == _suite(suite, None)
    assert _suite({**suite, "only": ["mia_loss"]}, None) != _suite(suite, None)
