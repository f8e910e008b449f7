"""``unlora audit RUN`` and ``unlora dial RUN`` as a user types them, on models made in a second."""

import fcntl
import json
import shutil

import pytest
from audited_runs import copy_run, write_config, write_run, write_runs
from plain_adapters import make_root
from tiny import LORA, llama

from unlora.audits.scores import AuditScores, judged
from unlora.audits.subject import AuditedModel
from unlora.audits.verdict import Thresholds
from unlora.cli.main import main
from unlora.model import get_model
from unlora.model.adapter_scale import scaled, write_scaled
from unlora.model.lora import LoRAModelForCausalLM
from unlora.recipes.audited_run import _as_evaluated
from unlora.runs.safe_loading import read_json

QUICK = ("audit=none", "+audit.mine={handler: quantise, form: int4}")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_runs(tmp_path_factory.mktemp("audited") / "saves")


@pytest.fixture
def runs(made, tmp_path, monkeypatch):
    """The runs, and answers that all tests share; what was found is gone afterwards."""
    monkeypatch.setenv("UNLORA_CACHE", str(made.parent / "cache"))
    monkeypatch.chdir(tmp_path)
    yield made
    for new in [*made.glob("npo-*"), made / "npo" / "audit"]:
        shutil.rmtree(new, ignore_errors=True)


@pytest.fixture
def loaded(monkeypatch):
    """The roles of the models that were loaded, in turn."""
    roles, load = [], AuditedModel.load
    monkeypatch.setattr(AuditedModel, "load", lambda self: roles.append(self.role) or load(self))
    return roles


def files(folder):
    """Everything below a folder but locks."""
    found = (file for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock")
    return {file: file.read_bytes() for file in found}


def read(run, name="AUDIT.json"):
    return json.loads((run / "audit" / name).read_text())


def audit(run, *words):
    main(["audit", str(run), *map(str, words), "--quiet"])
    return read(run)


def refused(capsys, *words):
    """The one sentence with which a command ends."""
    with pytest.raises(SystemExit) as stop:
        main([*map(str, words)])
    said = capsys.readouterr()
    assert stop.value.code == 2 and not said.out
    lines = [line for line in said.err.splitlines() if "template" not in line and line.strip()]
    assert "Traceback" not in said.err
    return lines[-1]


# --- what is found -------------------------------------------------------------------------------


def test_an_audit_says_how_much_is_left_under_each_attack(runs):
    found = audit(runs / "npo", *QUICK, "+audit.off={handler: scale, scale: 0.8}")
    assert found["verdict"]["name"] == "over-forgotten"
    assert found["retain_probability_after"].keys() == {"mine"}  # int4, of the merged weights
    assert 0 < found["retain_probability_after"]["mine"] != found["retain_probability"]["unlearned"]
    assert found["verdict"]["sentence"].endswith("Over-forgotten.")
    assert found["forget_rows"] == 24 and found["delivered"] == "merged"
    assert found["baseline"] == "a model that never saw the data"
    names = {"unlearned": "npo", "target": "target", "retain": "gold"}
    assert found["models"] == {role: str(runs / name) for role, name in names.items()}
    assert [one["name"] for one in found["attacks"]] == ["plain", "mine", "off"]
    plain, mine, off = found["attacks"]
    means = plain["means"]
    expected = (means["unlearned"] - means["retain"]) / (means["target"] - means["retain"])
    assert plain["residual"] == pytest.approx(expected) and plain["residual"] < -0.1
    low, high = plain["interval95"]
    assert low < plain["residual"] < high and plain["rows"] == 24 and plain["left_out"] is None
    assert plain["counts"] and mine["counts"] and not off["counts"]  # merged weights are delivered
    assert found["held"]["value"] == max(plain["residual"], mine["residual"])
    assert found["held"]["forms"] == 2 and found["held"]["worst"] in ("plain", "mine")
    assert found["thresholds"]["least_rows"] == 20 and found["not_run"] == {}
    utility = found["retain_probability"]
    assert utility["target"] > utility["unlearned"] > 0.5
    assert set(found["recognisable"]) == {"value", "interval95"}
    assert set(found["membership"]) == {"unlearned", "target", "retain"}


def test_the_target_is_known_and_a_retain_model_holds(runs):
    target = {"target": runs / "target", "retain_model": runs / "gold"}
    words = [f"{key}={value}" for key, value in target.items()]
    write_config(copy_run(runs / "target", runs / "npo-as-target"), str(runs / "root"))
    found = audit(runs / "npo-as-target", "audit=none", *words)
    assert found["verdict"]["name"] == "known" and found["attacks"][0]["residual"] == 1
    found = audit(runs / "gold", "audit=none", f"retain_model={runs / 'gold'}", words[0])
    assert found["verdict"]["name"] == "held" and found["attacks"][0]["residual"] == 0
    shutil.rmtree(runs / "gold" / "audit")


def test_without_a_retain_model_it_is_compared_with_the_root(runs):
    found = audit(runs / "npo", "audit=none", "retain_model=null")
    assert found["baseline"] == "the root model without adapters"
    assert "the root model without adapters" in found["verdict"]["sentence"]
    assert found["models"]["retain"].endswith("root")


def test_an_adapter_that_is_delivered_can_be_turned_down(runs):
    words = ("audit=none", "+audit.off={handler: scale}", "delivered=adapter")
    found = audit(runs / "npo", *words)
    assert found["verdict"]["name"] == "hidden" and found["held"]["worst"] == "off"
    assert found["held"]["value"] == pytest.approx(1)


def test_what_cannot_be_asked_is_left_out_and_said(runs, capsys):
    words = ("+audit.much={handler: relearn, least: 13}", "audit.mine=null", "thresholds.known=0.3")
    main(["audit", str(runs / "npo"), *QUICK, *words])
    found, said = read(runs / "npo"), capsys.readouterr().out
    assert list(found["not_run"]) == ["much"] and len(found["attacks"]) == 1
    assert "would train on 13 of 24 forget rows" in found["not_run"]["much"]
    assert f"much: not run: {found['not_run']['much']}" in said
    assert found["thresholds"]["known"] == 0.3 and "known 0.3" in said
    assert found["verdict"]["sentence"] in said
    assert said.splitlines()[-1] == f"Everything is in {runs / 'npo' / 'audit' / 'AUDIT.json'}"


@pytest.mark.slow
def test_programs_read_json_and_quiet_says_nothing(runs, capfd):
    main(["audit", str(runs / "npo"), "audit=none", "--json"])
    said = capfd.readouterr()
    assert json.loads(said.out) == read(runs / "npo")
    main(["audit", str(runs / "npo"), "audit=none", "--quiet"])
    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_attacks_can_be_left_out_and_changed(runs):
    gone = ("relearn", "relearn-benign", "depth", "nf4", "int4", "half", "more", "three-quarters")
    words = (*(f"~audit.{name}" for name in gone), "~audit.sample", "audit.wordings.examples=0")
    found = audit(runs / "npo", *words, "audit.int8.form=int4")
    assert [one["name"] for one in found["attacks"]] == ["plain", "wordings", "int8", "detached"]
    four = audit(runs / "npo", *QUICK)["attacks"][1]
    assert found["attacks"][2]["residual"] == four["residual"]


def test_too_few_rows_are_too_few_to_say(runs):
    run = copy_run(runs / "npo", runs / "npo-few")
    rows = (runs / "rows" / "forget.jsonl").read_text().splitlines(keepends=True)[:19]
    few = run / "few.jsonl"
    few.write_text("".join(rows))
    found = audit(run, "audit=none", f"data.forget.hf_args.path={few}")
    assert found["verdict"]["name"] == "too few to say" and "19 forget rows" in str(found)


# --- kept ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.budget(2)
def test_an_interrupted_audit_goes_on(runs, tmp_path, monkeypatch, loaded, capsys):
    monkeypatch.setenv("UNLORA_CACHE", str(tmp_path / "cache"))
    words = (*QUICK, "+audit.third={handler: quantise, form: int8}")
    with monkeypatch.context() as patch:
        merged, calls = AuditedModel.merged, []

        def interrupted(self):
            calls.append(self.role)
            if len(calls) == 5:  # the target under the third attack
                raise KeyboardInterrupt
            return merged(self)

        patch.setattr(AuditedModel, "merged", interrupted)
        with pytest.raises(SystemExit) as stop:
            main(["audit", str(runs / "npo"), *words])
        assert stop.value.code == 130
    assert "goes on where this one was" in capsys.readouterr().err
    assert not (runs / "npo" / "audit" / "AUDIT.json").exists()
    assert loaded == [*["unlearned", "target", "retain"] * 2, "unlearned"]
    loaded.clear()
    found = audit(runs / "npo", *words)
    assert loaded == ["target", "retain"] and len(found["attacks"]) == 3
    loaded.clear()
    again = audit(runs / "npo", *words)
    assert not loaded and again | {"cpu_seconds": 0} == found | {"cpu_seconds": 0}


@pytest.mark.slow
def test_a_damaged_answer_is_asked_again(runs, tmp_path, monkeypatch, loaded):
    monkeypatch.setenv("UNLORA_CACHE", str(tmp_path / "cache"))
    before = audit(runs / "npo", "audit=none")
    for file in (tmp_path / "cache").rglob("*.answers"):
        file.write_bytes(file.read_bytes()[:-9] + b"too short")
    loaded.clear()
    after = audit(runs / "npo", "audit=none")
    assert set(loaded) == {"unlearned", "target", "retain"}
    assert after["attacks"] == before["attacks"]


def test_two_at_once_are_one_too_many(runs, capsys):
    before = files(runs / "npo")
    with open(runs / "npo" / ".audit.audit.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another process would
        for command in ("audit", "dial"):
            said = refused(capsys, command, runs / "npo", "audit=none")
            assert said.startswith("Another process is at work in")
            assert said.endswith("audit'. Wait for it.")  # an audit has no task_name
    assert files(runs / "npo") == before


# --- refused -------------------------------------------------------------------------------------

WRONG = [
    (["~audit.nope"], "'audit.nope' does not exist"),
    (
        ["audit=nonsense"],
        "Unknown audit 'nonsense'. Did you mean 'none'? Known: brief, default, full",
    ),
    (["+audit.x={handler: quantize}"], "audit.x: Unknown attack 'quantize'. Did you mean 'quanti"),
    (["+audit.x={form: int4}"], "audit.x: it has no handler. Known: depth, plain, quantise"),
    (["audit.int4.bits=4"], "audit.int4: Unknown parameter of attack quantise 'bits'. Known: blo"),
    (["audit.int4.form=fp3"], "audit.int4: Unknown form of attack quantise 'fp3'."),
    (["audit.sample.samples=8"], "audit.sample: k of attack sample holds 16; it must be from 1"),
    (["thresholds.knwn=0.1"], "Unknown parameter of thresholds 'knwn'. Did you mean 'known'?"),
    (["thresholds.known=much"], "thresholds.known is 'much' (text); it must be a number."),
    (["delivered=both"], "Unknown delivered 'both'. Known: adapter, merged."),
    (["delivred=adapter"], "Unknown key 'delivred'. Did you mean 'delivered'?"),
    (["retain_model=TARGET"], "are the same model. Give target=RUN, the model before unlearning"),
    (["retain_model=OTHER"], "Give a retain_model that was made from the same model, or retain_m"),
    (["retain_model=nowhere/at-all"], "The model 'nowhere/at-all' is not in the local cache"),
    (["data.forget.hf_args.path=no.jsonl"], "The forget rows of the audit: There is no file"),
    (["data.forget.answer_key=reply"], "The forget rows of the audit: Unknown column 'reply'."),
    (["data.forgt.hf_args.path=no.jsonl"], "Did you mean 'forget'?"),
    (["--jsn"], "unlora audit cannot use '--jsn'. Type: unlora audit --help"),
    (["another"], "One run at a time"),
]


@pytest.fixture(scope="module")
def other(made):
    """A retain model of another root."""
    root = make_root(made / "other-root", llama(seed=5, max_position_embeddings=1024))
    model = LoRAModelForCausalLM.from_pretrained(root, LORA)
    return write_run(made / "other", model, root, mode="finetune")


@pytest.mark.default_cases(7)
@pytest.mark.parametrize("words, expected", WRONG, ids=[words[0] for words, _ in WRONG])
def test_what_is_wrong_is_one_sentence_and_nothing_is_written(
    runs, other, capsys, loaded, words, expected
):
    before = files(runs)
    places = {"TARGET": runs / "target", "OTHER": other}
    given = [word.replace(key, str(places.get(key, "")) or key) for word in words
             for key in [word.partition("=")[2]]]  # fmt: skip
    assert expected in refused(capsys, "audit", runs / "npo", *(given or words))
    assert files(runs) == before and not loaded


def test_what_is_no_run_of_unlearning_is_refused(runs, capsys, tmp_path):
    before = files(runs)
    assert refused(capsys, "audit", "nowhere") == "There is no run folder 'nowhere'."
    assert refused(capsys, "audit").startswith("Which run?")
    assert "has no run_config.json that says what it was" in refused(capsys, "audit", runs / "root")
    said = refused(capsys, "audit", runs / "target")
    assert "was not made to forget (finetune)" in said and "Give target=RUN" in said
    assert files(runs) == before


def test_a_run_without_adapter_needs_a_retain_model(runs, capsys):
    full = shutil.copytree(runs / "other-root" if (runs / "other-root").is_dir() else runs / "root",
                           runs / "npo-full")  # fmt: skip
    write_config(full, str(runs / "target"))
    said = refused(capsys, "audit", full, "retain_model=null")
    assert "has no adapters to switch off" in said and "give retain_model=RUN" in said
    said = refused(capsys, "dial", full)
    assert "was trained in full" in said


def test_a_run_without_forget_rows_is_asked_for_them(runs, capsys):
    run = copy_run(runs / "npo", runs / "npo-bare")
    write_config(run, str(runs / "target"), parts=("retain",))
    assert "names no forget rows" in refused(capsys, "audit", run)


@pytest.mark.slow
def test_an_adapter_that_cannot_be_scaled_is_attacked_otherwise(runs):
    model = LoRAModelForCausalLM.from_pretrained(str(runs / "root"), LORA | {"use_dora": True})
    run = write_run(runs / "npo-dora", model, str(runs / "root"))
    words = (f"target={runs / 'target'}", "audit=none", "+audit.off={handler: scale}")
    found = audit(run, *words)
    assert "use_dora=true" in found["not_run"]["off"] and len(found["attacks"]) == 1


@pytest.mark.slow
def test_without_an_answer_there_is_too_little_to_say(runs, tmp_path):
    file = tmp_path / "empty.jsonl"
    file.write_text(json.dumps({"question": "Who?", "answer": ""}) + "\n")
    words = ("audit=none", "+audit.depth={handler: depth}", f"data.forget.hf_args.path={file}")
    found = audit(runs / "npo", *words)
    assert found["verdict"]["name"] == "too few to say" and found["attacks"][0]["rows"] == 0
    assert found["not_run"] == {"depth": "No forget row has an answer. Leave the attack out."}


def test_a_run_that_was_not_made_to_forget_is_asked_about_the_rows_of_its_evaluation(runs):
    gold = copy_run(runs / "gold", runs / "npo-gold")  # by a fixture each npo-* goes
    config = read_json(gold / "run_config.json")
    suite = {"handler": "TOFUEvaluator", "data": {"forget": {
        "handler": "QADataset", "question_key": "question", "answer_key": "answer",
        "hf_args": {"path": "forget.jsonl"},
    }}}  # fmt: skip
    other = {"forget": {**suite["data"]["forget"], "hf_args": {"path": "default.jsonl"}}}
    trained = {**config, "eval": {"tofu": {**suite, "data": other}}}
    assert _as_evaluated(gold, trained) == trained  # never evaluated
    (gold / "eval_config.json").write_text(json.dumps({"eval": {"tofu": suite}}))
    assert _as_evaluated(gold, trained)["eval"] == {"tofu": suite}
    unlearned = {**trained, "mode": "unlearn"}
    assert _as_evaluated(gold, unlearned) == unlearned


# --- the dial ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_dialled_to_plain_a_run_knows_no_more_than_the_retain_model(runs, capsys):
    before = files(runs / "npo")
    main(["dial", str(runs / "npo"), "audit=none", "--to", "plain", "--json"])
    content = json.loads(capsys.readouterr().out)
    folder, scale = runs / f"npo-dial-{content['scale']:.2f}", content["scale"]
    assert content == read(runs / "npo", "DIAL.json") and content["run"] == str(folder)
    assert content["reached"] and content["to"] == "plain" and 0.75 < scale < 0.9
    assert {0.0, 0.25, 0.5, 0.75, 1.0, 1.25} <= {point["scale"] for point in content["curve"]}
    residuals = {point["scale"]: point["residual"] for point in content["curve"]}
    assert residuals[0.0] == 1 and residuals[1.0] < -0.1
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["lora_alpha"] == pytest.approx(LORA["lora_alpha"] * scale)
    assert {f: c for f, c in files(runs / "npo").items() if "audit" not in f.parts} == before
    found = audit(folder, "audit=none")
    assert found["attacks"][0]["residual"] == pytest.approx(0, abs=0.1)
    assert found["attacks"][0]["residual"] <= 0
    section = {"as_trained": True}
    models = [
        get_model({**section, "model_args": {"pretrained_model_name_or_path": str(place)}},
                  trainable=False)[0]
        for place in (runs / "npo", folder)
    ]  # fmt: skip
    ids = models[0].dummy_inputs["input_ids"]
    with scaled(models[0], "link1", scale):
        expected = models[0](input_ids=ids).logits
    assert models[1](input_ids=ids).logits == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_dialled_to_plain_a_run_that_forgot_little_is_scaled_beyond_the_curve(runs):
    weak = write_scaled(runs / "npo", 0.5, runs / "npo-weak")
    main(["dial", str(weak), "audit=none", "--to", "plain", "--quiet"])
    content = read(weak, "DIAL.json")
    points = {point["scale"]: point for point in content["curve"]}
    assert 1.5 < content["scale"] < 1.8 and content["reached"]  # half of 0.75 to 0.9
    assert {1.25, 1.5, 2.0} <= {*points} and 3.0 not in points
    assert points[1.25]["residual"] > 0 >= points[2.0]["residual"]
    assert all(isinstance(point["retain"], float) for point in points.values())


@pytest.mark.slow
def test_a_run_that_its_evaluation_calls_collapsed_may_hold_at_another_scale(runs):
    run = copy_run(runs / "npo", runs / "npo-collapsed")
    log = {"collapsed": {"agg_value": 1.0, "note": "utility is gone"}}
    (run / "evals").mkdir()
    (run / "evals" / "OWN_EVAL.json").write_text(json.dumps(log))
    assert "utility is gone" in audit(run, *QUICK)["verdict"]["sentence"]
    main(["dial", str(run), *QUICK, "--quiet"])
    assert read(run, "DIAL.json")["verdict"]["name"] == "held"


@pytest.mark.slow
@pytest.mark.budget(2)
def test_dialled_to_the_audit_the_least_scale_that_holds_is_written(runs, capsys):
    main(["dial", str(runs / "npo"), *QUICK, "--output", str(runs / "npo-mine")])
    content, said = read(runs / "npo", "DIAL.json"), capsys.readouterr().out
    scale = content["scale"]
    assert content["verdict"]["name"] == "held" and content["run"] == str(runs / "npo-mine")
    assert content["verdict"]["sentence"] in said and f"at scale {scale:.2f}" in said
    tried = {(one["scale"], str(one["attacks"])): one for one in content["audits"]}
    assert tried[scale, "all"]["verdict"]["name"] == "held"
    assert audit(runs / "npo-mine", *QUICK)["verdict"]["name"] == "held"
    known = [one["scale"] for one in content["audits"] if one["verdict"]["name"] == "known"]
    assert all(one < scale for one in known)


@pytest.mark.slow
def test_where_only_the_plain_question_is_asked_the_dial_ends(runs):
    main(["dial", str(runs / "npo"), "audit=none", "--quiet"])
    content = read(runs / "npo", "DIAL.json")
    assert content["verdict"]["name"] == "held" and content["scale"] < 0.9


def test_dialled_to_utility_the_largest_scale_is_written(runs):
    main(["dial", str(runs / "npo"), "audit=none", "--to", "utility=0.9", "--quiet"])
    content = read(runs / "npo", "DIAL.json")
    points = {point["scale"]: point["retain"] for point in content["curve"]}
    kept = [scale for scale, share in points.items() if share >= 0.9 * points[0.0]]
    assert max(kept) - 0.01 <= content["scale"] <= max(kept) and content["verdict"] is None
    assert min(points[scale] for scale in points if scale > max(kept)) < 0.9 * points[0.0]


def test_where_no_scale_does_it_nothing_is_written_and_it_is_said(runs, capsys):
    before = {folder.name for folder in runs.iterdir() if folder.is_dir()}
    words = ("thresholds.hidden=-9", "audit=none")
    main(["dial", str(runs / "npo"), *words])
    content, said = read(runs / "npo", "DIAL.json"), capsys.readouterr().out
    assert not content["reached"] and content["scale"] is content["run"] is None
    assert "No scale from 0 to 1.25 does it (--to audit). Nothing was written." in said
    assert {folder.name for folder in runs.iterdir() if folder.is_dir()} == before


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("to", ["nonsense", "utility", "utility=2", "utility=0", "utility=much"])
def test_a_dial_to_nothing_is_refused(runs, capsys, loaded, to):
    before = files(runs)
    assert f"--to is {to!r}; it must be audit, plain" in refused(
        capsys, "dial", runs / "npo", "--to", to
    )
    assert files(runs) == before and not loaded


def test_what_cannot_be_turned_is_refused_before_it_is_asked(runs, capsys, loaded):
    root = str(runs / "root")
    model = LoRAModelForCausalLM.from_pretrained(root, LORA | {"use_dora": True})
    run = write_run(runs / "npo-dora", model, root)
    before = files(runs)
    assert "use_dora=true" in refused(capsys, "dial", run)
    said = refused(capsys, "dial", runs / "target", "target=" + str(runs / "root"))
    assert "was not made to forget" in said
    assert files(runs) == before and not loaded


def test_of_several_processes_one_writes_and_speaks(runs, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    before = files(runs)
    main(["dial", str(runs / "npo"), "audit=none", "--to", "plain"])
    main(["audit", str(runs / "npo"), "audit=none"])
    assert files(runs) == before and not capsys.readouterr().out


def test_a_folder_that_is_filled_is_refused_before_a_model_is_loaded(runs, capsys, loaded):
    words = ("--to=plain", f"--output={runs / 'target'}", "audit=none")
    assert "is not empty" in refused(capsys, "dial", runs / "npo", *words)
    assert not loaded


def test_a_dialled_run_is_never_written_over(runs, capsys):
    (runs / "npo-mine").mkdir()
    (runs / "npo-mine" / "mine.txt").write_text("mine")
    words = ("--to=plain", f"--output={runs / 'npo-mine'}", "audit=none")
    assert "is not empty" in refused(capsys, "dial", runs / "npo", *words)
    assert [file.name for file in (runs / "npo-mine").iterdir()] == ["mine.txt"]


def test_the_figures_of_an_audit_can_be_computed_from_its_scores_alone(runs):
    found = audit(runs / "npo", *QUICK)
    again = judged(AuditScores.from_json(read(runs / "npo", "AUDIT_SCORES.json")),
                   Thresholds(**found["thresholds"]), found["baseline"])  # fmt: skip
    written = json.loads(json.dumps(again))
    assert written == {key: found[key] for key in written} and "held" in written
