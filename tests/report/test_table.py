import json
from types import SimpleNamespace

import pytest
from report_runs import KINDS_OF_RUN, log, write_json

from unlora.report import Entry, compare
from unlora.report.runs import read_rows
from unlora.report.table import text_table
from unlora.studies import run_study as study
from unlora.studies import scheduler

# utility and repetition of each benchmark, and a forget figure
FIGURES = {
    "TOFU": ("model_utility", "retain_repetition", "forget_Q_A_Prob"),
    "MUSE": ("retain_knowmem_ROUGE", "retain_knowmem_repetition", "forget_knowmem_ROUGE"),
    "RWKU": ("neighbor_level2_ROUGE", "neighbor_repetition", "forget_level2_ROUGE"),
    "OWN": ("retain_utility", "retain_repetition", "forget_Q_A_Prob"),
    "LMEval": ("mmlu/acc", "", "wmdp_bio/acc"),
}


def table(home, kind, settings=None, **runs):
    """The table of runs with these (utility, repetition), one seed for each pair."""
    utility, repetition, forget = FIGURES[kind]
    entries = []
    for name, seeds in runs.items():
        role = name if name in ("target", "gold") else "method"
        for seed, (kept, repeated) in enumerate(seeds):
            content = {utility: {"agg_value": kept}, forget: {"agg_value": 0.9},
                       repetition: {"agg_value": repeated}}  # fmt: skip
            if kept is None:
                content[utility]["unscored"] = 7
            folder = home / f"{name}{seed}"
            write_json(folder / f"{kind}_EVAL.json", content)
            config = {"metrics": {"collapsed": {"handler": "collapsed", **(settings or {})}}}
            write_json(folder / "eval_config.json", {"eval": {kind.lower(): config}})
            entries.append(Entry(name, role, folder, seed))
    return text_table(compare(entries))


def marked(text):
    return [line.split()[0] for line in text.splitlines() if line.endswith("collapsed")]


def test_means_are_over_seeds(tmp_path):
    missing = {"not_computed": "no log"}
    logs = (
        {"a": {"agg_value": 1.0}, "b": {"agg_value": 2.0}, "c": missing},
        {"a": {"agg_value": 3.0}, "b": {"agg_value": None}, "c": missing},
    )
    for seed, content in enumerate(logs):
        write_json(tmp_path / str(seed) / "TOFU_EVAL.json", content)
    [row] = read_rows([Entry("NPO", "method", tmp_path / str(seed), seed) for seed in (0, 1)])
    found = row.figures()
    assert found["a"] == {"mean": 2.0, "seeds": [1.0, 3.0]}
    assert found["b"] == {"mean": None, "seeds": [2.0, None]}, "not a mean of what is left"
    assert "c" not in found, "no seed has computed it"


@pytest.mark.parametrize("kind", FIGURES)
def test_collapsed_is_below_half_of_the_targets_utility_in_every_benchmark(kind, tmp_path):
    # of choices a quarter is guessed: half of the way from .25 to .65 is .45
    target, below, above = {"LMEval": (0.65, 0.44, 0.46)}.get(kind, (0.5, 0.24, 0.26))
    text = table(tmp_path, kind, target=[(target, 0)], bad=[(below, 0)], fair=[(above, 0)])
    assert marked(text) == ["bad"]


@pytest.mark.parametrize("kind", [kind for kind in FIGURES if kind != "LMEval"])
def test_collapsed_is_who_repeats_itself_in_every_benchmark(kind, tmp_path):
    assert marked(table(tmp_path, kind, target=[(0.5, 0)], NPO=[(0.5, 0.6)])) == ["NPO"]


def test_collapsed_is_whose_logits_are_not_finite(tmp_path):
    assert marked(table(tmp_path, "MUSE", target=[(0.5, 0)], dead=[(None, 0)])) == ["dead"]


def test_a_mean_over_seeds_is_judged(tmp_path):
    runs = {"target": [(0.4, 0), (0.6, 0)], "NPO": [(0.2, 0), (0.29, 0)]}
    assert marked(table(tmp_path, "TOFU", **runs)) == ["NPO"]


@pytest.mark.parametrize("utility, expected", [(0.09, ["NPO"]), (0.11, [])])
def test_without_a_target_collapsed_is_below_the_floor(utility, expected, tmp_path):
    assert marked(table(tmp_path, "TOFU", NPO=[(utility, 0)])) == expected


@pytest.mark.parametrize("kind", ["OWN", "LMEval"])
def test_without_a_target_own_data_and_choices_call_none_collapsed(kind, tmp_path):
    assert marked(table(tmp_path, kind, NPO=[(0.01, 0)])) == []


@pytest.mark.parametrize("kind", [kind for kind in FIGURES if kind != "LMEval"])
@pytest.mark.parametrize(
    "settings, expected",
    [({}, []), ({"utility_share": 0.9}, ["NPO"]), ({"max_repetition": 0.2}, ["NPO"])],
)
def test_the_thresholds_of_an_evaluations_config_mark_its_line(kind, settings, expected, tmp_path):
    text = table(tmp_path, kind, settings, target=[(0.7, 0)], NPO=[(0.6, 0.3)])
    assert marked(text) == expected


def test_a_run_without_a_utility_is_not_called_collapsed(tmp_path):
    write_json(tmp_path / "NPO" / "TOFU_EVAL.json", {"forget_Q_A_Prob": {"agg_value": 0.2}})
    assert marked(text_table(compare([Entry("NPO", "method", tmp_path / "NPO")]))) == []


def test_the_table_says_first_where_target_and_gold_are_alike(tmp_path):
    entries = []
    for role in ("target", "gold", "good"):
        content = log(role)
        for name in ("forget_Q_A_ROUGE", "extraction_strength", "mia_min_k"):
            del content[name]
        at = {"target": 0.43, "gold": 0.35}.get(role, KINDS_OF_RUN[role][0])
        content["forget_Q_A_Prob"] = {"agg_value": at, "interval95": [at - 0.07, at + 0.07]}
        write_json(tmp_path / role / "TOFU_EVAL.json", content)
        entries.append(Entry(role, "method" if role == "good" else role, tmp_path / role))
    lines = text_table(compare(entries)).splitlines()
    assert lines[0].startswith(
        "Target and gold do not differ in what was to be forgotten (forget prob: target 0.430 "
        "[0.360, 0.500], gold 0.350 [0.280, 0.420])"
    )
    assert "Train the target further" in lines[0] and lines[1] == ""
    content = json.loads((tmp_path / "gold" / "TOFU_EVAL.json").read_text())
    content["forget_Q_A_Prob"] = {"agg_value": 0.28, "interval95": [0.21, 0.35]}
    write_json(tmp_path / "gold" / "TOFU_EVAL.json", content)
    assert text_table(compare(entries)).splitlines()[0].split()[:2] == ["forget", "prob"]


def test_the_table_has_a_line_for_each_run(tmp_path):
    text = table(tmp_path, "TOFU", target=[(0.5, 0)], GradAscent=[(1e-5, 0)])
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["target", "GradAscent"]
    assert text.splitlines()[-1].endswith("collapsed") and "1.0e-05" in text


def test_the_figures_of_every_benchmark_have_a_column(tmp_path):
    muse = {"forget_verbmem_ROUGE": {"agg_value": 0.2}, "retain_knowmem_ROUGE": {"agg_value": 0.5}}
    write_json(tmp_path / "MUSE_EVAL.json", muse)
    write_json(tmp_path / "LMEval_EVAL.json", {"mmlu/acc": {"agg_value": 0.6}})
    said = text_table(compare([Entry("NPO", "method", tmp_path)]))
    assert "0.200" in said and "0.500" in said and "0.600" in said


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("kind", ["MUSE", "RWKU", "LMEval"])
def test_a_study_of_any_benchmark_ends_with_a_table_that_marks_what_is_broken(
    kind, tmp_path, capsys
):
    utility, _, forget = FIGURES[kind]
    stages = []
    for run, role, kept in (
        ("target", "target", 0.6),
        ("NPO", "method", 0.55),
        ("GA", "method", 0.1),
    ):
        folder = tmp_path / "seed0" / run
        figures = {utility: kept, forget: 0.2 if role == "method" else 0.7}
        content = {name: {"agg_value": value} for name, value in figures.items()}
        write_json(folder / "evals" / f"{kind}_EVAL.json", content)
        write_json(folder / "evals" / f"{kind}_SUMMARY.json", {"note": "x", **figures})
        stages.append(SimpleNamespace(kind="eval", name=run, title=run, run=run, role=role, seed=0,
                                      folder=str(folder), evals=str(folder / "evals")))  # fmt: skip
    done = scheduler.Done(finished={stage.name for stage in stages})
    results = study._written(stages, tmp_path, done, [], None)
    assert results["NPO"][utility]["mean"] == 0.55 and "note" not in results["NPO"]
    assert marked((tmp_path / "table.txt").read_text()) == ["GA"]
    assert 'GA</bdi> <span class="tag warn"' in (tmp_path / "report.html").read_text()
    assert (tmp_path / "table.txt").read_text() in capsys.readouterr().out
