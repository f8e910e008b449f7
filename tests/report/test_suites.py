"""The page and the evaluation agree on which end of a metric is better."""

from pathlib import Path

import pytest
import yaml

from unlora.evals.plan import read_request
from unlora.report.suites import SUITES, aim, end

CONFIGS = Path(__file__).parents[2] / "configs" / "eval"
FILES = sorted(CONFIGS.glob("*_metrics/*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_shipped_metric_has_the_direction_of_its_config(file):
    higher = read_request(file.stem, yaml.safe_load(file.read_text())).higher_is_better
    found = aim(file.stem, {})
    if found == "gold":
        found = end(file.stem)
        # what is right where gold's is has no end, whatever may choose a checkpoint
        assert found is None or higher is False
        return
    assert found == {True: "high", False: "low", None: found}[higher]
    assert higher is not None or found in ("zero", None)


def test_a_metric_of_ones_own_is_believed():
    config = {"metrics": {"mine": {"higher_is_better": False}}}
    assert aim("mine", config) == "low" and aim("mine", {}) is None


def test_every_figure_of_a_suite_is_a_metric_it_has():
    names = {kind: {file.stem for file in CONFIGS.glob(f"{kind.lower()}_metrics/*.yaml")}
             for kind in ("TOFU", "MUSE", "RWKU", "OWN")}  # fmt: skip
    for kind, known in names.items():
        suite = SUITES[kind]
        assert {*suite.main, *suite.forget, suite.utility, suite.repetition} <= known, kind
