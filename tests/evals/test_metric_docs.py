"""The page on metrics has every metric, and says which end of it is better as the code does."""

import re
from pathlib import Path

import pytest

from unlora.evals.metrics import METRICS

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
ROW = re.compile(r"^\| `(\w+)` \|(.*)\|$", re.MULTILINE)
BETTER = {"high": True, "low": False, "0": None, "neither": None}


@pytest.fixture(scope="module")
def page():
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in
            ROW.findall(PAGE.read_text("utf-8"))}  # fmt: skip


def test_every_metric_stands_on_the_page_and_nothing_else(page):
    assert set(page) == set(METRICS)


@pytest.mark.parametrize("name", METRICS)
def test_the_page_says_which_end_is_better(name, page):
    _, _, better, *_ = page[name]
    assert BETTER[better] is METRICS[name].higher_is_better
