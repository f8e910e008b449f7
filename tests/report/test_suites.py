"""The page and the evaluation agree on which end of a metric is better."""

from dataclasses import replace

import pytest

from unlora.config.metrics import shipped_metrics
from unlora.evals.pass_plan import read_request
from unlora.report.suites import SUITES, aim, end

METRICS = {suite: shipped_metrics(suite) for suite in ("tofu", "muse", "rwku", "own")}


@pytest.mark.parametrize("suite", METRICS)
def test_every_shipped_metric_has_the_direction_of_its_config(suite):
    for name, settings in METRICS[suite].items():
        higher = read_request(name, settings).higher_is_better
        direction = aim(name, {})
        if direction == "gold":
            # what is right where gold's is has no end, whatever may choose a checkpoint
            assert end(name) is None or higher is False, name
            continue
        assert direction == {True: "high", False: "low", None: direction}[higher], name
        assert higher is not None or direction in ("zero", None), name


def test_a_metric_of_ones_own_is_believed():
    config = {"metrics": {"mine": {"higher_is_better": False}}}
    assert aim("mine", config) == "low" and aim("mine", {}) is None


def test_every_figure_of_a_suite_is_a_metric_it_has():
    for kind, known in ((suite.upper(), set(METRICS[suite])) for suite in METRICS):
        suite = SUITES[kind]
        assert {*suite.main, *suite.forget, suite.utility, suite.repetition} <= known, kind


@pytest.mark.parametrize("suite", METRICS)
def test_the_log_and_the_page_judge_collapse_by_the_same_figures_and_thresholds(suite):
    of_log, of_page = read_request("collapsed", METRICS[suite]["collapsed"]), SUITES[suite.upper()]
    assert of_log.inputs == {
        "utility": of_page.utility, "repetition": of_page.repetition, "target": of_page.utility
    }  # fmt: skip
    assert replace(of_page.rule, **of_log.settings) == of_page.rule
