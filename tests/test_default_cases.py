"""Of many cases a few are default tests, and none is lost."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
TEST = """
import pytest

@pytest.mark.default_cases(3)
@pytest.mark.parametrize("case", range(7))
def test_many(case):
    print(f"case {case}.")

@pytest.mark.default_cases(1)
@pytest.mark.parametrize("case", [pytest.param(7, marks=pytest.mark.slow), 8, 9])
def test_few(case):
    print(f"case {case}.")

def test_alone():
    print("case 10.")
"""


@pytest.mark.parametrize(
    "expression, cases",
    [("not slow", {0, 3, 6, 8, 10}), ("slow", {1, 2, 4, 5, 7, 9})],
)
def test_cases_that_are_not_default_run_every_night(pytester, expression, cases):
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text("utf-8"))
    pytester.makepyfile(TEST)
    result = pytester.runpytest_inprocess("-s", "-p", "no:xdist", "-m", expression)
    assert {case for case in range(11) if f"case {case}." in result.stdout.str()} == cases
