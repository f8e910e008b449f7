"""Many rows are made into tokens under a bar, or with a line a minute; never in silence."""

import logging

import pytest

from unlora.data import progress_bar
from unlora.data.progress_bar import shown


@pytest.fixture
def minutes(monkeypatch):
    """Every look at the clock is 25 seconds later."""
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: next(clock))


def test_a_log_gets_a_line_a_minute(minutes, caplog):
    with caplog.at_level(logging.INFO):
        assert list(shown(range(8), "data.forget")) == list(range(8))
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"data.forget: {number} of 8 rows are tokens" for number in (2, 5)]


@pytest.mark.parametrize("what, level", [("", logging.INFO), ("data.forget", logging.WARNING)])
def test_nothing_is_said_where_less_is_wanted(minutes, caplog, capfd, what, level):
    with caplog.at_level(level):
        assert list(shown(range(8), what)) == list(range(8))
    assert not caplog.records and not "".join(capfd.readouterr())


def test_a_terminal_gets_a_bar(monkeypatch, caplog, capfd):
    monkeypatch.setattr(progress_bar.sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress_bar, "AFTER", 0)
    with caplog.at_level(logging.INFO):
        assert list(shown(range(8), "data.forget")) == list(range(8))
    assert "data.forget" in capfd.readouterr().err and not caplog.records
