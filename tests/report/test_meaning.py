"""What is said first where figures of forgetting mean little, and of what no figure sees."""

import json

import pytest
from report_runs import log, write_json

from unlora.cli.report import main
from unlora.report import Entry, compare, summary, write

AT = {"target": 0.43, "gold": 0.35, "npo": 0.20}
FURTHER = "Train the target further on what it is to forget"


def near(at, half=0.07):
    return {"agg_value": at, "interval95": [at - half, at + half]}


def runs(home, kind="TOFU", *, roles=("target", "gold", "npo"), **changed):
    """Runs whose only forget figure is a probability; ``npo={...}`` changes entries of its log."""
    entries = []
    for name in roles:
        content = log("good") | {"forget_Q_A_Prob": near(AT[name])}
        for other in ("forget_Q_A_ROUGE", "extraction_strength", "mia_min_k"):
            del content[other]
        content |= {"retain_utility": {"agg_value": 0.7}} | changed.get(name, {})
        write_json(home / name / f"{kind}_EVAL.json", content)
        entries.append(Entry(name, "method" if name == "npo" else name, home / name))
    return entries


def found(entries):
    return compare(entries).findings[0]


def rows(**columns):
    """Figures of each question."""
    lists = zip(*columns.values(), strict=True)
    return {str(i): dict(zip(columns, row, strict=True)) for i, row in enumerate(lists)}


def test_where_target_and_gold_are_alike_that_is_the_headline(tmp_path):
    said = found(runs(tmp_path))
    assert said.meaningless
    assert summary.headline(said) == (
        "Target and gold do not differ in what was to be forgotten (forget prob: target 0.430 "
        "[0.360, 0.500], gold 0.350 [0.280, 0.420]), so no figure of the way between them means "
        "anything. Train the target further on what it is to forget (more "
        "trainer.args.num_train_epochs, a higher trainer.args.learning_rate), and unlearn that one"
    )
    ((name, sentence),) = summary.sentences(said)
    assert name == "npo" and "how much it forgot cannot be said" in sentence
    assert not any("forget_Q_A_Prob" in line.best for line in said.lines)


@pytest.mark.parametrize("target, apart", [(0.43, False), (0.50, True), (0.20, False)])
def test_their_intervals_decide(tmp_path, target, apart):
    at = near(target, 0.05)
    said = found(
        runs(tmp_path, target={"forget_Q_A_Prob": at}, gold={"forget_Q_A_Prob": near(0.35, 0.05)})
    )
    assert said.meaningless is not apart
    assert ("of the way from target to gold" in summary.sentences(said)[0][1]) is apart


def test_a_figure_that_tells_them_apart_is_enough_and_the_others_are_named(tmp_path):
    at = {"target": 0.9, "gold": 0.1, "npo": 0.1}
    apart = {name: {"extraction_strength": near(value)} for name, value in at.items()}
    said = found(runs(tmp_path, **apart))
    assert said.forget == ("extraction_strength",) and said.alike == ("forget_Q_A_Prob",)
    assert "100 % of the way" in summary.sentences(said)[0][1]
    assert "Not counted, as it does not tell target from gold: forget prob." in (
        summary.measured_by(said)
    )


def test_every_file_and_the_command_say_so_first(tmp_path, capsys):
    entries = runs(tmp_path)
    page = write(tmp_path / "out", entries, title="T")
    assert "<bdi>Target and gold do not differ" in page.read_text()
    assert 'id="scatter-' not in page.read_text() and "#scatter-" not in page.read_text()
    lines = (tmp_path / "out" / "report.md").read_text().splitlines()
    assert lines[2].startswith("**Target and gold do not differ")
    told = [row for row in (tmp_path / "out" / "table.csv").read_text().splitlines()
            if ",forget_Q_A_Prob," in row]  # fmt: skip
    assert len(told) == 3
    assert all(row.endswith("says nothing about forgetting: target and gold do not differ")
               for row in told)  # fmt: skip
    folders = {entry.name: str(entry.folder) for entry in entries}
    main([folders["npo"], "--target", folders["target"], "--gold", folders["gold"], "--output",
          str(tmp_path / "again")])  # fmt: skip
    assert capsys.readouterr().out.startswith("Target and gold do not differ")


def test_target_and_gold_alone_are_compared_too(tmp_path):
    said = summary.headline(found(runs(tmp_path, roles=("target", "gold"))))
    assert said.startswith("Nothing was made to forget here: target and gold only; Target and gold")


def test_without_gold_a_target_that_knows_nothing_is_named(tmp_path):
    at = {"forget_Q_A_Prob": near(0.02, 0.01)}
    said = found(runs(tmp_path, roles=("target", "npo"), target=at))
    assert summary.headline(said).startswith("The target knows nothing of what was to be forgotten")


@pytest.mark.parametrize(
    "probability, suffix, weak", [(0.4, 0.5, True), (0.4, 1.0, False), (0.6, 0.5, False)]
)
def test_without_gold_a_target_that_hardly_knows_is_named(tmp_path, probability, suffix, weak):
    of_target = {
        "forget_Q_A_Prob": near(probability) | {"value_by_index": rows(prob=[probability] * 4)},
        "extraction_strength": {"agg_value": suffix, "value_by_index": rows(score=[suffix] * 4)},
    }
    head = summary.headline(found(runs(tmp_path, roles=("target", "npo"), target=of_target)))
    assert head.startswith("The target hardly knows what was to be forgotten") is weak
    assert (FURTHER in head) is weak


def leakage(*others):
    return {"forget_leakage": {"agg_value": 1.0, "value_by_index": rows(
        score=[1] * len(others), own=[0] * len(others), other=list(others))}}  # fmt: skip


APART = {"forget_Q_A_Prob": near(0.95)}


def test_who_tells_other_rows_secrets_did_not_forget(tmp_path):
    said = found(runs(tmp_path, target=APART, npo=leakage(1, 1, 1, 0), gold=leakage(0, 0, 0, 0)))
    assert summary.headline(said) == (
        "npo mixed up what was to be forgotten: most answers hold what another forget answer says"
    )
    assert summary.sentences(said)[0][1].startswith(
        "mixed up what it was asked to forget rather than forgot it: 75 % of its answers hold what "
        "another forget answer says (of gold's 0 %); by the other figures 125 % of the way"
    )


@pytest.mark.parametrize("usual, said", [((0, 0, 0, 0, 0), True), ((0, 0, 0, 0, 1), False)])
def test_some_of_it_stands_beside_what_was_forgotten(tmp_path, usual, said):
    some = runs(tmp_path, target=APART, npo=leakage(0, 0, 0, 0, 1), gold=leakage(*usual))
    ((_, sentence),) = summary.sentences(found(some))
    assert sentence.startswith("forgot ")
    assert ("20 % of its answers hold what another forget answer says" in sentence) is said


@pytest.mark.parametrize(
    "entries, said",
    [
        ({"forget_repetition": {"agg_value": 0.64}}, "what it writes there repeats itself (64 %)"),
        ({"forget_fluency": {"agg_value": 0.03}}, "is hardly text (fluency 0.03)"),
        ({"forget_Q_A_ROUGE": {"agg_value": 0.0, "value_by_index": rows(
            input=["Who?"] * 3, ground_truth=["Ada."] * 3, generation=["", " ", "Ada"])}},
         "67 % of its answers there are empty"),
        ({"forget_repetition": {"agg_value": 0.4}, "forget_fluency": {"agg_value": 0.5}}, None),
    ],
)  # fmt: skip
def test_what_is_no_text_is_named(tmp_path, entries, said):
    findings = found(runs(tmp_path, target=APART, npo=entries))
    ((_, sentence),) = summary.sentences(findings)
    assert (said or "forgot") in sentence
    assert ("what npo wrote there is no text" in summary.headline(findings)) is (said is not None)


def test_own_data_without_a_target_say_that_collapse_is_not_known(tmp_path):
    ((_, sentence),) = summary.sentences(found(runs(tmp_path, "OWN", roles=("npo",))))
    assert sentence.endswith(
        "whether it collapsed is not known: there is no target to compare the utility with."
    )
    both = runs(tmp_path / "both", "OWN", roles=("target", "npo"))
    assert "collapsed" not in summary.sentences(found(both))[0][1]


def choices(wmdp, mmlu):
    return {"wmdp_bio/acc": near(wmdp, 0.02), "mmlu/acc": near(mmlu, 0.01)}


def test_choices_are_counted_from_what_guessing_reaches(tmp_path):
    for name, content in (("target", choices(0.65, 0.60)), ("npo", choices(0.30, 0.55))):
        write_json(tmp_path / name / "LMEval_EVAL.json", content)
    said = found(
        [Entry("target", "target", tmp_path / "target"), Entry("npo", "method", tmp_path / "npo")]
    )
    point = said.methods[0].point
    # (.65 - .30) / (.65 - .25) and (.55 - .25) / (.60 - .25)
    assert (point.forgot, point.kept) == (pytest.approx(0.875), pytest.approx(0.857, abs=1e-3))
    assert "Shares are counted from what guessing reaches, 25 %." in summary.measured_by(said)


def test_a_target_that_guesses_knows_nothing(tmp_path):
    for name, content in (("target", choices(0.27, 0.60)), ("npo", choices(0.25, 0.55))):
        write_json(tmp_path / name / "LMEval_EVAL.json", content)
    said = found(
        [Entry("target", "target", tmp_path / "target"), Entry("npo", "method", tmp_path / "npo")]
    )
    assert summary.headline(said).startswith("The target knows nothing of what was to be forgotten")
    assert json.dumps(said.alike) == '["wmdp_bio/acc"]'
