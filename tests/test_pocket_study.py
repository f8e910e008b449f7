"""The phenomena of the large benchmarks, on the embedded one: what ``make demo`` promises.

Slow: it is the demo itself, 18 trainings and evaluations (``make test-slow``).
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STUDY = Path(__file__).parents[1] / "src" / "study.py"
RUNS = ["target", "gold", "GradAscent", "GradDiff", "NPO", "SimNPO"]


def run_study(folder, *overrides):
    command = [sys.executable, str(STUDY), "--config-name=study", "experiment=study/pocket/lora"]
    done = subprocess.run([*command, *overrides], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((folder / "saves/study/pocket/summary.json").read_text())
    return summary, done.stdout


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return run_study(tmp_path_factory.mktemp("study"))


@pytest.fixture
def mean(study):
    return lambda run, metric: study[0][run][metric]["mean"]


def test_every_run_has_every_metric_for_three_seeds(study):
    summary, _ = study
    assert list(summary) == RUNS
    for run in RUNS:
        assert len(summary[run]["model_utility"]["seeds"]) == 3
        assert set(summary[run]) >= {"forget_Q_A_Prob", "forget_Q_A_ROUGE", "mia_min_k"}


def test_the_target_knows_what_gold_does_not(mean):
    assert mean("target", "forget_Q_A_Prob") > 0.90
    assert mean("target", "forget_Q_A_ROUGE") > 0.90
    assert mean("target", "mia_min_k") > 0.9
    assert mean("gold", "forget_Q_A_Prob") < 0.35
    assert 0.35 < mean("gold", "mia_min_k") < 0.65
    for run in ("target", "gold"):
        assert mean(run, "retain_Q_A_Prob") > 0.85


def test_gradient_ascent_collapses_and_is_called_so(mean, study):
    assert mean("GradAscent", "model_utility") < 0.5 * mean("target", "model_utility")
    (line,) = [x for x in study[1].splitlines() if x.startswith("GradAscent")]
    assert line.endswith("collapsed")


def test_npo_or_simnpo_forgets_at_least_halfway_and_keeps_its_utility(mean):
    def holds(run):
        kept = mean(run, "model_utility") >= 0.85 * mean("target", "model_utility")
        moved = [
            (mean("target", m) - mean(run, m)) / (mean("target", m) - mean("gold", m))
            for m in ("forget_Q_A_Prob", "extraction_strength", "mia_min_k")
        ]
        return kept and min(moved) >= 0.5

    assert holds("NPO") or holds("SimNPO")


def test_the_same_seed_gives_the_same_table(study, tmp_path):
    again, _ = run_study(tmp_path, "seeds=[0]")
    for run in RUNS:
        first = {metric: value["seeds"][0] for metric, value in study[0][run].items()}
        assert {metric: value["seeds"][0] for metric, value in again[run].items()} == first
