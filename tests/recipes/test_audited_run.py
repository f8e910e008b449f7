"""What an audit finds from a run folder, on models that nobody trained."""

import json

import pytest
from audited_runs import PARTS, write_run
from plain_adapters import make_root
from tiny import LORA, llama

from unlora.cli.compose import composed
from unlora.config.audit_config import read_audit
from unlora.model.lora import LoRAModelForCausalLM
from unlora.recipes.audited_run import NEVER_SAW, ROOT, find_run
from unlora.recipes.who_saw import who_saw


@pytest.fixture
def runs(tmp_path):
    """``root``, ``finetune/target`` and ``finetune/gold``, ``npo``, and rows; not yet trained."""
    saves = tmp_path / "saves"
    (saves / "rows").mkdir(parents=True)
    (saves / "finetune").mkdir()
    for part, rows in PARTS.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (saves / "rows" / f"{part}.jsonl").write_text(text)
    root = make_root(saves / "root", llama())
    model = LoRAModelForCausalLM.from_pretrained(root, LORA)
    for name, parts in {"target": ("forget", "retain"), "gold": ("retain",)}.items():
        next(p for p in model.parameters() if p.requires_grad).data += 1  # another model
        write_run(saves / "finetune" / name, model, root, mode="finetune")
        change(saves / "finetune" / name, tmp_path, data={"train": sets(saves, *parts)})
    target = saves / "finetune" / "target"
    npo = LoRAModelForCausalLM.from_pretrained(str(target), LORA, lineage="stack")
    write_run(saves / "npo", npo, str(target))
    data = {part: sets(saves, part) for part in ("forget", "retain")}
    change(saves / "npo", tmp_path, data=data)
    return saves


def sets(saves, *parts):
    """The section of data sets to train on."""
    return {
        part: {"handler": "QADataset", "args": {
            "hf_args": {"path": str(saves / "rows" / f"{part}.jsonl")},
            "question_key": "question", "answer_key": "answer"}}
        for part in parts
    }  # fmt: skip


def change(run, root, *, dtype="float32", **sections):
    """Another dtype, or other sections, in ``run_config.json``."""
    config = json.loads((run / "run_config.json").read_text())
    config["model"]["model_args"]["torch_dtype"] = dtype
    config["paths"]["root_dir"] = str(root)
    config["trainer"]["handler"] = "GradDiff"
    (run / "run_config.json").write_text(json.dumps(config | sections))


def found(run, *words):
    cfg = composed("audit", words)
    cfg.run = str(run)
    return find_run(read_audit(cfg))


def test_the_root_in_place_of_a_retain_model_is_asked_in_the_same_dtype(runs):
    change(runs / "npo", runs.parent, dtype="bfloat16")
    run = found(runs / "npo", "retain_model=null")
    assert run.baseline == ROOT
    assert run.retain.resolved.load_kwargs == run.unlearned.resolved.load_kwargs


def test_a_run_that_evaluates_nothing_has_a_retain_model_all_the_same(runs):
    change(runs / "npo", runs.parent, eval={})
    run = found(runs / "npo")
    assert (run.retain.path, run.baseline) == (str(runs / "finetune" / "gold"), NEVER_SAW)


def test_a_retain_model_has_not_seen_the_rows_that_are_given(runs):
    file = runs / "rows" / "retain.jsonl"
    assert found(runs / "npo").baseline == NEVER_SAW
    assert found(runs / "npo", f"data.forget.hf_args.path={file}").baseline == ROOT


def test_a_model_that_is_not_asked_as_it_was_trained_is_named(runs, caplog):
    found(runs / "npo")
    assert "another template" not in caplog.text
    config = json.loads((runs / "finetune" / "gold" / "run_config.json").read_text())
    config["model"]["template_args"] = {"apply_chat_template": False}
    (runs / "finetune" / "gold" / "run_config.json").write_text(json.dumps(config))
    found(runs / "npo")
    assert f"{runs / 'finetune' / 'gold'} was trained in another template" in caplog.text


def test_a_run_that_is_its_own_retain_model_is_named(runs, caplog):
    found(runs / "npo")
    assert "its own retain model" not in caplog.text
    found(runs / "npo", f"retain_model={runs / 'npo'}")
    assert f"{runs / 'npo'} is its own retain model: by that, nothing is left" in caplog.text


def test_running_text_can_be_given_to_a_run_on_questions(runs):
    file = runs / "rows" / "text.jsonl"
    file.write_text(json.dumps({"text": "Ada keeps owl 0."}) + "\n")
    section = f"{{handler: CompletionDataset, text_key: text, hf_args: {{path: {file}}}}}"
    run = found(runs / "npo", f"data.forget={section}", "retain_model=null")
    assert not run.data.forget.is_qa and len(run.data.forget) == 1


def test_data_sets_that_have_no_part_are_named(runs, caplog):
    found(runs / "npo")
    assert "data sets as" not in caplog.text
    change(runs / "npo", runs.parent, eval={}, data={"forget": sets(runs, "forget", "retain")})
    found(runs / "npo")
    assert "2 data sets as forget data (forget, retain), and the audit asks about" in caplog.text
    caplog.clear()
    found(runs / "npo", f"data.forget.hf_args.path={runs / 'rows' / 'forget.jsonl'}")
    assert "data sets as" not in caplog.text


def test_forget_rows_that_the_target_never_saw_are_counted(runs, caplog):
    found(runs / "npo")
    file = runs / "rows" / "other.jsonl"
    strange = [{"question": f"What does Zoe {n} sing?", "answer": f"Song {n}."} for n in range(3)]
    for rows in (strange, [*PARTS["forget"], *strange]):
        assert "was not trained on" not in caplog.text  # of no row: it may be what the root knows
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found(runs / "npo", f"data.forget.hf_args.path={file}", "retain_model=null")
    said = f"{runs / 'finetune' / 'target'} was not trained on 3 of the {len(rows)} forget rows"
    assert said in caplog.text


def test_pairs_that_are_asked_as_running_text_are_not_called_new(runs, caplog):
    file = runs / "rows" / "books.jsonl"
    rows = [
        {"question": f"Which {n} books of Owen Fraser are there in Korean or in Hebrew?",
         "answer": f"The {n} books of Owen Fraser are there in Korean and in Hebrew."}
        for n in ("old", "new", "short", "long")
    ]  # fmt: skip
    text = [{"text": f"{row['question']} {row['answer']}"} for row in rows] + [{"text": "Bo naps."}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = runs / "finetune" / "target"
    data = sets(runs, "forget")
    data["forget"]["args"]["hf_args"]["path"] = str(file)
    change(target, runs.parent, data={"train": data})
    seen = who_saw(text, [target]).rows
    assert 0 < sum(map(bool, seen)) < len(text)  # near
    asked = runs / "rows" / "asked.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in text))
    section = f"{{handler: CompletionDataset, text_key: text, hf_args: {{path: {asked}}}}}"
    found(runs / "npo", f"data.forget={section}", "retain_model=null")
    assert "was not trained on" not in caplog.text


def test_retain_rows_that_cannot_be_asked_are_named(runs, caplog):
    file = runs / "rows" / "several.jsonl"
    file.write_text(json.dumps({"question": "Who?", "answer": ["Ada", "Bo"]}) + "\n")
    run = found(runs / "npo", f"data.retain.hf_args.path={file}")
    assert run.data.retain is None
    assert "the audit does without retain rows: each of them has several answers" in caplog.text


def test_a_fine_tuned_run_is_asked_about_rows_that_were_evaluated_from_where_they_were(runs):
    gold, target = runs / "finetune" / "gold", f"target={runs / 'finetune' / 'target'}"
    words = (target, "retain_model=null")
    change(
        gold, runs.parent, eval=json.loads((runs / "npo" / "run_config.json").read_text())["eval"]
    )
    (gold / "eval_config.json").write_text(
        json.dumps({"eval": {"lm": {"handler": "LMEvalEvaluator"}}})
    )
    assert len(found(gold, *words).data.forget) == len(PARTS["forget"])  # as it was trained
    (runs / "sets" / "two").mkdir(parents=True)
    rows = PARTS["holdout"][:2]
    (runs / "sets" / "two" / "train.json").write_text(json.dumps(rows))
    forget = {"handler": "QADataset", "question_key": "question", "answer_key": "answer",
              "hf_args": {"path": "someone/two"}}  # fmt: skip
    suite = {"handler": "TOFUEvaluator", "data": {"forget": forget}}
    content = {"eval": {"tofu": suite}, "paths": {"datasets_dir": str(runs / "sets")}}
    (gold / "eval_config.json").write_text(json.dumps(content))
    assert found(gold, *words).data.forget.rows == rows
