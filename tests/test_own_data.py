"""``unlora eval model=PATH data.forget=FILE``: a user's model and data, and no YAML."""

import csv
import json

import numpy as np
import pytest
import tiny

from unlora.cli.main import main

FORGET = [
    {"question": f"Who keeps the {animal}?", "answer": f"{name} keeps the {animal}."}
    for name, animal in (("Ada", "bees"), ("Ivo", "geese"), ("Mara", "owls"))
]
RETAIN = [
    {"question": f"Where is the {place}?", "answer": f"The {place} is in {town}."}
    for place, town in (("mill", "Arlow"), ("bridge", "Tenby"))
]
OTHERS = {"paraphrased_answer": "It is kept by Ada.", "perturbed_answer": ["By Bo.", "By Cy."]}
OF_FORGET = {
    "forget_Q_A_Prob", "forget_Q_A_ROUGE", "exact_memorization", "extraction_strength",
    "forget_repetition", "forget_leakage", "forget_facts",
}  # fmt: skip
OF_RETAIN = {
    "retain_Q_A_Prob", "retain_Q_A_ROUGE", "retain_repetition", "retain_utility", "retain_facts"
}  # fmt: skip
OF_HOLDOUT = {
    "mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus", "mia_gradnorm", "mia_recall",
    "holdout_Q_A_ROUGE",
}  # fmt: skip
OF_OTHERS = {
    "forget_Q_A_PARA_Prob", "forget_Q_A_PERT_Prob", "forget_truth_ratio", "forget_Truth_Ratio",
    "forget_truth_ratio_prob_mean", "agg_memorization",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder with a tokenizer, and nothing that says how it is asked."""
    folder = tmp_path_factory.mktemp("models") / "mine"
    tiny.llama(max_position_embeddings=2048).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Files are found from the folder of the user."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(file, rows):
    if file.endswith(".jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        text = json.dumps(rows)
    with open(file, "w", encoding="utf-8", newline="") as stream:
        if file.endswith(".csv"):
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            stream.write(text)


def told(row):
    """The row with other names of its columns, and as CSV has it."""
    renamed = {"prompt": row["question"], "reply": row["answer"]}
    others = {key: row[key] for key in OTHERS if key in row}
    if others:
        others["perturbed_answer"] = json.dumps(others["perturbed_answer"])
    return renamed | others


def has_values(summary):
    """Four tokens are too few to repeat four words; everything else is there."""
    return all((value is None) == name.endswith("_repetition") for name, value in summary.items())


def evaluate(capsys, model, *typed):
    """What a script reads, and the log."""
    main(["eval", f"model={model}", *typed, "eval.own.max_new_tokens=4", "--json"])
    out, err = capsys.readouterr()
    with open("saves/eval/eval_mine/OWN_EVAL.json", encoding="utf-8") as stream:
        return json.loads(out), json.load(stream), err


def test_forget_and_retain_data_are_enough(model, capsys):
    write("my.jsonl", [*FORGET, {"question": "And who?"}, {"question": "Or?", "answer": None}])
    write("kept.csv", [*RETAIN, {"question": "Why?", "answer": " "}])
    summary, log, err = evaluate(capsys, model, "data.forget=my.jsonl", "data.retain=kept.csv")
    assert set(summary) == OF_FORGET | OF_RETAIN
    assert has_values(summary)
    assert "Question: ... Answer: ..." not in err  # it has a chat template
    # rows without an answer are counted, not averaged
    for name, unscored in (("forget_Q_A_Prob", 2), ("retain_Q_A_Prob", 1)):
        rows = [row["prob"] for row in log[name]["value_by_index"].values()]
        assert log[name]["unscored"] == unscored == rows.count(None)
        assert log[name]["agg_value"] == pytest.approx(np.mean([x for x in rows if x is not None]))
    # and the rest says what it takes
    assert "give data.holdout=FILE" in log["mia_loss"]["not_computed"]
    assert "paraphrased_answer" in log["forget_Truth_Ratio"]["not_computed"]
    # in the log, not on the screen: there a line says how many and where
    said = [line for line in err.splitlines() if "not computed" in line]
    assert len(said) == 1 and said[0].endswith("saves/eval/eval_mine/OWN_SUMMARY.json")
    assert "collapsed" in said[0] and len(said[0]) < 200 and "holdout" not in err
    assert log["collapsed"]["not_computed"].startswith("not known: there is no target")
    assert "target_logs_path" in log["collapsed"]["not_computed"]


@pytest.mark.slow
def test_holdout_data_and_further_columns_bring_their_figures(model, capsys):
    write("my.csv", [told(row | OTHERS) for row in FORGET])
    asked = [{"question": f"Who sells {n}?", "answer": f"{n} is for sale."} for n in range(9)]
    write("new.json", [told(row) for row in asked])
    keys = ("eval.own.question_key=prompt", "eval.own.answer_key=reply")
    files = ("data.forget=my.csv", "data.holdout=new.json")
    summary, log, _ = evaluate(capsys, model, *files, *keys)
    assert set(summary) == OF_FORGET | OF_HOLDOUT | OF_OTHERS
    assert has_values(summary)
    # a cell of a CSV file holds both wrong answers
    assert {len(r["prob"]) for r in log["forget_Q_A_PERT_Prob"]["value_by_index"].values()} == {2}
    assert "give data.retain=FILE" in log["retain_Q_A_Prob"]["not_computed"]
    assert "no adapter" in log["mia_reference"]["not_computed"]


@pytest.mark.slow
def test_the_plan_is_told_and_nothing_is_asked(model, capsys, monkeypatch, elsewhere):
    monkeypatch.setattr("unlora.model.get_model", lambda *_, **__: pytest.fail("loaded"))
    write("my.jsonl", FORGET)
    main(["eval", f"model={model}", "data.forget=my.jsonl", "--plan"])
    lines = capsys.readouterr().out.splitlines()
    assert ["score", "forget", "3"] in [line.split()[:3] for line in lines]
    assert not (elsewhere / "saves").exists()


WRONG = {
    "column of questions": ({"prompt": "Who?", "answer": "Ada."}, "my.jsonl",
                            "Known: answer, prompt. Set eval.own.question_key=COLUMN."),
    "column of answers": ({"question": "Who?", "reply": "Ada."}, "my.jsonl",
                          "Known: question, reply. Set eval.own.answer_key=COLUMN."),
    "nothing in it": (None, "my.jsonl", "my.jsonl holds no rows."),
    "another kind": ({"question": "Who?", "answer": "Ada."}, "my.yaml", "of an unknown kind"),
    "several answers": ({"question": "Who?", "answer": ["Ada.", "Ivo."]}, "my.jsonl",
                        "wants one answer per row"),
}  # fmt: skip


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("row, file, said", WRONG.values(), ids=WRONG)
def test_wrong_data_are_refused_before_a_model_is_loaded(
    model, capsys, monkeypatch, row, file, said
):
    monkeypatch.setattr("unlora.model.get_model", lambda *_, **__: pytest.fail("loaded"))
    write(file, [row] * 2 if row else [])
    with pytest.raises(SystemExit) as exit_:
        main(["eval", f"model={model}", f"data.forget={file}", "--json"])
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert said in err and out == ""


@pytest.mark.slow
def test_a_retain_file_that_is_given_must_have_the_columns(model, capsys):
    write("my.jsonl", FORGET)
    write("kept.csv", [{"prompt": "Where?", "reply": "There."}])
    with pytest.raises(SystemExit):
        main(["eval", f"model={model}", "data.forget=my.jsonl", "data.retain=kept.csv"])
    assert "data set retain: Unknown column 'question'" in capsys.readouterr().err
