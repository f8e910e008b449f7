"""How far an evaluation is, also where nobody sees a bar."""

import logging

import pytest

from unlora.evals import progress
from unlora.evals.progress import Bar


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def evaluated(clock, *, quiet=False):
    """Ten passes of a hundred tokens, each half a minute long."""
    with Bar(quiet=quiet) as bar:
        bar.expect("TOFU", 1000)
        for _ in range(10):
            clock[0] += 30
            bar.done("generate", 100)


def test_without_a_terminal_a_line_a_minute_says_how_far_it_is(clock, caplog):
    caplog.set_level(logging.INFO, "unlora.evals.progress")
    evaluated(clock)
    assert len(caplog.messages) == 5
    assert caplog.messages[0] == "TOFU generate: 20 % of 1000 tokens, about 4 min left"


def test_quiet_is_quiet(clock, caplog):
    caplog.set_level(logging.INFO, "unlora.evals.progress")
    evaluated(clock, quiet=True)
    assert not caplog.messages
