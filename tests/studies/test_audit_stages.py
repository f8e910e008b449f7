"""Audits and dialled methods in the plan of a study, and what their results depend on."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from audited_runs import write_runs
from omegaconf import OmegaConf
from pretended import study

from unlora.cli.compose import composed
from unlora.errors import InputError
from unlora.model.lineage import Link
from unlora.results.audit_log import write_audit
from unlora.studies import audit_stages, stage_fingerprints
from unlora.studies.config import read
from unlora.studies.dry_run import check_evaluations
from unlora.studies.stage_fingerprints import key
from unlora.studies.stages import Stage, plan

NONE = {"plain": {"handler": "plain"}}
DEFAULT = OmegaConf.to_container(composed("audit", []).audit)


def planned(**changes):
    checked = read(study(**changes))
    stages = audit_stages.with_audits(checked, plan(checked, Path("home")))
    return {stage.name: stage for stage in stages}


def test_methods_are_audited_and_dialled_for_the_seeds_that_are_asked_for():
    stages, plain = planned(audit=DEFAULT, dial="plain", audit_seeds=1), planned()
    new = {f"seed0-{method}{end}" for method in ("NPO", "GradDiff")
           for end in ("-audit", "-dialled-dial", "-dialled-eval", "-dialled-audit")}  # fmt: skip
    assert stages.keys() - plain.keys() == new
    assert all(stages[name] == plain[name] for name in plain)
    home = Path("home/seed0")
    told = {"audit": DEFAULT, "target": str(home / "target"), "retain_model": str(home / "gold")}
    trainings = {"seed0-NPO-train", "seed0-target-train", "seed0-gold-train"}
    audit, dial = stages["seed0-NPO-audit"], stages["seed0-NPO-dialled-dial"]
    assert audit.model == audit.folder == dial.model == str(home / "NPO")
    assert dial.folder == str(home / "NPO-dialled")
    assert audit.params == told and dial.params == told | {"to": "plain"}
    assert trainings <= set(audit.needs) and "seed0-NPO-audit" in dial.needs
    asked, again = stages["seed0-NPO-dialled-eval"], stages["seed0-NPO-dialled-audit"]
    assert asked.model == again.model == dial.folder
    assert "seed0-NPO-dialled-dial" in asked.needs and "seed0-NPO-dialled-dial" in again.needs
    assert asked.retain_log == str(home / "gold/evals")
    assert asked.target_log == str(home / "target/evals")
    seen = set()
    for name, stage in stages.items():
        assert seen.issuperset(stage.needs)
        seen.add(name)


def test_without_gold_a_method_is_compared_with_the_root():
    stages = planned(audit=NONE, gold=None, target="owner/target", seeds=[0])
    audit = stages["seed0-NPO-audit"]
    assert audit.params["retain_model"] is None and audit.params["target"] == "owner/target"
    assert audit.needs == ("seed0-NPO-train",)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"dial": "audit"}, "dial is audit, but there is none. Give audit=default, or dial=plain"),
        ({"audit": NONE, "audit_seeds": 0}, "audit_seeds is 0"),
        ({"audit": NONE, "dial": "utility=2"}, "it must be audit, plain, utility=SHARE"),
        ({"audit": NONE, "dial": "more"}, "it must be audit, plain, utility=SHARE"),
        (
            {"audit": NONE, "dial": "plain", "methods": {"NPO-dialled": ["trainer=NPO"]}},
            "A method cannot be called 'NPO-dialled' where dial is set: that of 'NPO' is called",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(changes, expected):
    with pytest.raises(InputError, match=expected):
        read(study(**changes))
    assert read(study(methods={"NPO-dialled": ["trainer=NPO"]}))


def test_an_attack_that_is_not_there_is_one_sentence_before_anything_is_trained():
    for kind in ("audit", "dial"):
        stages = planned(audit={"x": {"handler": "quantize"}}, dial="plain", seeds=[0])
        (one, *_) = [stage for stage in stages.values() if stage.kind == kind]
        with pytest.raises(InputError) as raised:
            check_evaluations([one])
        said = str(raised.value)
        assert said.startswith(f"{one.title}: audit.x: Unknown attack 'quantize'. Did you")
        assert "\n" not in said
    check_evaluations([stage for stage in planned(audit=DEFAULT).values() if stage.kind == "audit"])


# --- what the result depends on ------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return write_runs(tmp_path_factory.mktemp("audited") / "saves")


def stage(folder, kind="audit", audit=NONE, **params):
    told = {"audit": audit, "target": str(folder / "target"), "retain_model": str(folder / "gold")}
    run = str(folder / "npo")
    return Stage(kind, "npo", "method", 0, run, "unlearn", (), told | params, model=run)


@pytest.mark.slow
def test_the_key_of_an_audit_is_that_of_what_is_asked_of_what(runs):
    before = key(stage(runs))
    assert key(stage(runs)) == before
    assert key(stage(runs, audit=DEFAULT)) != before
    other = DEFAULT | {"int4": {"handler": "quantise", "form": "int8"}}
    assert key(stage(runs, audit=other)) != key(stage(runs, audit=DEFAULT))
    assert key(stage(runs, retain_model=None)) != before
    assert key(stage(runs, "dial", to="plain")) != key(stage(runs, "dial", to="audit"))
    assert key(replace(stage(runs), model=str(runs / "target"))) != before


def test_the_key_follows_content_and_not_the_name_of_a_folder(runs, tmp_path):
    before = key(stage(runs))
    moved = shutil.copytree(runs, tmp_path / "moved")  # the rows are where they were
    assert key(stage(moved)) == before
    settings, lineage = (moved / "npo" / name for name in ("adapter_config.json", "lineage.json"))
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"lora_alpha": 6}))
    facts = json.loads(lineage.read_text())
    facts["links"][-1]["config_sha256"] = Link.of(moved / "npo").config_sha256
    lineage.write_text(json.dumps(facts))
    assert key(stage(moved)) != before
    rows = runs / "rows" / "forget.jsonl"
    text = rows.read_text()
    rows.write_text(text.replace("owl 3?", "owl 33?"))
    stage_fingerprints._hash_of_rows.cache_clear()  # a process reads them once
    assert key(stage(runs)) != before
    rows.write_text(text)
    stage_fingerprints._hash_of_rows.cache_clear()
    assert key(stage(runs)) == before


@pytest.mark.slow
@pytest.mark.budget(2)
def test_a_stage_audits_and_dials_in_this_process(runs):
    audit_stages.run(stage(runs))
    file, scores = audit_stages.outputs(stage(runs))
    assert scores.name == "AUDIT_SCORES.json"
    assert json.loads(file.read_text())["verdict"]["name"] == "over-forgotten"
    dialled = replace(stage(runs, "dial", to="plain"), folder=str(runs / "npo-dialled"))
    for _ in range(2):  # the second sets the first aside
        audit_stages.run(dialled)
    assert (runs / "npo-dialled" / "adapter_config.json").is_file()
    assert (runs / "npo-dialled.previous-1" / "adapter_config.json").is_file()
    assert list(audit_stages.outputs(dialled)) == []
    write_audit(runs / "npo-dialled" / "audit", {"verdict": {"name": "held", "sentence": ""}})
    assert len(list(audit_stages.outputs(dialled))) == 1


def test_a_dial_that_no_attack_decides_needs_no_audit():
    stages, plain = planned(dial="plain", audit_seeds=1), planned()
    new = stages.keys() - plain.keys()
    assert {name.rpartition("-")[2] for name in new} == {"dial", "eval"}
    dial = stages["seed0-NPO-dialled-dial"]
    assert "seed0-NPO-train" in dial.needs
    assert set(audit_stages.config_of(dial).audit) == {"plain"}
