"""The parts of benchmarks/methods.py that train nothing, and the page that it wrote."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from unlora.errors import InputError

ROOT = Path(__file__).parents[2]
TRAINERS = {file.stem for file in (ROOT / "configs" / "trainer").glob("*.yaml")}
# DPO with its default answers; settings that reproduce others' numbers
NOT_COMPARED = {"finetune", "IdkDPO", *(name for name in TRAINERS if name.endswith("_upstream"))}


@pytest.fixture(scope="module")
def methods():
    spec = importlib.util.spec_from_file_location(
        "methods_benchmark", ROOT / "benchmarks" / "methods.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def entries(methods):
    return methods.read_methods(ROOT / "benchmarks" / "methods.yaml", [])


def result(methods, prob=0.3, ks=0.2, utility=0.7, quality=0.5, **more):
    summary = {
        "forget_Q_A_Prob": prob, "forget_quality_ks": ks, "model_utility": utility,
        "forget_quality": quality, "extraction_strength": 0.2, "privleak": 3.0,
    }  # fmt: skip
    return methods.Result(summary, **{"seconds": 10.0, "peak": 600_000_000, **more})


def test_every_method_is_compared_within_the_budget(methods, entries):
    chosen = {re.fullmatch("trainer=(.*)", entry.fixed[0])[1] for entry in entries}
    assert chosen == TRAINERS - NOT_COMPARED
    for entry in entries:
        assert 1 <= len(entry.trials) <= methods.MOST_TRIALS
        assert len(entry.about.split()) > 15 and "arXiv" in entry.paper


def test_too_many_trials_are_refused(methods):
    method = methods.Method("X", "", "", (), {"a": [1, 2, 3, 4], "b": [1, 2, 3, 4]})
    with pytest.raises(InputError, match="X has 16 trials; at most 12"):
        _ = method.trials


def test_the_score_needs_both_closeness_and_utility(methods):
    target = result(methods, utility=0.8)
    # 1 - .2 = .8 and .7 / .8 = .875: 2 * .8 * .875 / 1.675
    assert methods.score(result(methods), target) == pytest.approx(1.4 / 1.675)
    assert methods.score(result(methods, ks=1.0), target) == 0
    assert methods.score(result(methods, utility=0.0), target) == 0
    assert methods.score(methods.Result({}, 0.0, failure="diverged"), target) == 0
    # more utility than the target's does not count
    assert methods.score(result(methods, ks=0, utility=0.9), target) == 1


@pytest.mark.parametrize(
    "summary, said",
    [
        ({}, "failed"),
        ({"forget_Q_A_Prob": 0.0, "model_utility": 0.3, "forget_quality": 0.9}, "collapsed"),
        ({"forget_Q_A_Prob": 0.92, "model_utility": 0.8, "forget_quality": 0.0}, "does nothing"),
        (
            {"forget_Q_A_Prob": 0.3, "model_utility": 0.75, "forget_quality": 0.2},
            "better than GradDiff",
        ),
        ({"forget_Q_A_Prob": 0.3, "model_utility": 0.75, "forget_quality": 0.1}, ""),
        ({"forget_Q_A_Prob": 0.3, "model_utility": 0.7, "forget_quality": 0.2}, ""),
    ],
)  # fmt: skip
def test_verdicts(methods, summary, said):
    target = {"forget_Q_A_Prob": 0.95, "model_utility": 0.8}
    gold = {"forget_Q_A_Prob": 0.3, "model_utility": 0.8}
    graddiff = {"forget_quality": 0.1, "model_utility": 0.7}
    assert methods.verdict(summary, target, gold, graddiff) == said


def test_finished_runs_are_found_again_and_a_cut_line_is_not_believed(methods, tmp_path):
    bench = methods.Benchmark(tmp_path, 1)
    method = methods.Method("NPO", "", "", ("trainer=NPO",), {})
    stage = bench.unlearning(method, ("trainer.method_args.alpha=4",), 0, 7)
    other = bench.unlearning(method, ("trainer.method_args.alpha=8",), 0, 7)
    assert stage not in bench.results
    bench.results.add(stage, result(methods))
    with open(tmp_path / "results.jsonl", "a", encoding="utf-8") as stream:
        stream.write(json.dumps({"key": methods.Results.key(other)})[:-3])
    again = methods.Benchmark(tmp_path, 1)
    assert again.results[stage] == result(methods)
    assert other not in again.results
    again.results.add(other, result(methods))
    assert other in methods.Benchmark(tmp_path, 1).results
    again.run([stage])  # there is nothing left to run


def test_the_page_has_a_row_and_a_paragraph_for_each(methods, entries):
    chosen = [entry for entry in entries if entry.name in ("GradDiff", "NPO", "GradAscent")]
    collapsed = result(methods, prob=0.0, utility=0.1, quality=0.9)
    found = {"GradDiff": result(methods, quality=0.1), "NPO": result(methods, utility=0.75),
             "GradAscent": collapsed}  # fmt: skip
    rows = [(entry, entry.trials[0], [found[entry.name]], 8) for entry in chosen]
    text = methods.page(rows, [result(methods, prob=0.95, utility=0.8)], [result(methods)])
    assert "{" not in text.split("## Table")[1]
    first = text.split("## Does it hold?")[0]
    table = [line for line in first.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 2 + 3
    assert "better than GradDiff" in next(line for line in table if "[NPO]" in line)
    assert "collapsed" in next(line for line in table if "[GradAscent]" in line)
    for entry in chosen:
        assert f"### {entry.name}\n\n{entry.about} *{entry.paper}*" in text


def test_the_written_page_is_about_the_shipped_methods(entries):
    text = (ROOT / "docs" / "methods.md").read_text("utf-8")
    held = (ROOT / "benchmarks" / "results" / "methods_held.md").read_text("utf-8")
    assert held in text
    assert re.findall(r"^### (.*)$", text, re.MULTILINE) == [entry.name for entry in entries]
    for entry in entries:
        assert entry.about in text
