"""Before anything is forgotten: whether the target knows it, and whether anyone can tell."""

import json
import logging
import types

import numpy as np
import pytest

from unlora.data.chat_encoding import Encoded
from unlora.evals import target
from unlora.evals.records import Scored
from unlora.recipes.evaluate import figures
from unlora.results.baseline_log import BaselineLog
from unlora.results.eval_log import read_written, write_log
from unlora.results.value import Value

FIRST = types.SimpleNamespace(global_step=0)


def scored(probability, hits):
    logp = np.log(np.full(len(hits), probability))
    return Scored(logp, np.array(hits), logp, logp, "", False)


def row(*labels):
    return Encoded(list(range(len(labels))), list(labels))


def said(monkeypatch, caplog, answers, retain=None, rows=None, state=FIRST):
    """What a training says before its first step, if the target answers so."""
    asked = []

    def score(model, rows, texts, **_):
        asked.extend(rows)
        return answers

    monkeypatch.setattr(target, "score", score)
    rows = [row(-100, 1)] * len(answers) if rows is None else rows
    with caplog.at_level(logging.WARNING):
        target.TargetCheck(rows, 0, None, retain).on_train_begin(None, state, None, model=None)
    return [record.message for record in caplog.records], asked


UNSURE = [scored(0.4 + 0.01 * i, [True, False]) for i in range(9)]  # .40 to .48, none by heart


def test_a_target_that_hardly_knows_the_rows_is_named_with_figures(monkeypatch, caplog):
    (line,), _ = said(monkeypatch, caplog, UNSURE)
    assert line.startswith(
        "The model hardly knows what it is to forget: it gives 9 forget answers a probability of "
        "0.440 [0.422, 0.456] per token (0 by heart). No figure"
    )
    assert "Train the target further" in line


def test_a_target_that_knows_them_is_left_in_peace(monkeypatch, caplog):
    assert said(monkeypatch, caplog, [scored(0.9, [True, True])] * 9) == ([], [row(-100, 1)] * 9)
    unlikely = [*UNSURE[:7], *[scored(0.4, [True, True])] * 2]  # but two of nine by heart
    assert not said(monkeypatch, caplog, unlikely)[0]


@pytest.mark.parametrize("retain, warned", [(0.30, False), (0.42, True), (0.41, True)])
def test_with_a_retain_model_their_intervals_decide(monkeypatch, caplog, retain, warned):
    beside = Value(retain, interval=(retain - 0.02, retain + 0.02))
    lines, _ = said(monkeypatch, caplog, UNSURE, beside)
    assert bool(lines) is warned
    if warned:
        assert f"and a model that never saw them {retain:.3f} [" in lines[0]


def test_running_text_and_later_steps_are_not_asked(monkeypatch, caplog):
    text, cut = row(3, 4, 5), row()
    assert said(monkeypatch, caplog, [], rows=[text, cut]) == ([], [])
    resumed = types.SimpleNamespace(global_step=4)
    assert said(monkeypatch, caplog, UNSURE, state=resumed) == ([], [])


def test_of_many_rows_some_are_asked(monkeypatch, caplog):
    many = [row(-100, i) for i in range(1000)]
    _, asked = said(monkeypatch, caplog, UNSURE, rows=many)
    assert len(asked) == target.MOST_ROWS and asked[-1].labels[1] > 900


def near(at):
    return Value(at, interval=(at - 0.07, at + 0.07))


def log_of(folder, **values):
    write_log(folder, "OWN", {name: near(value) for name, value in values.items()})
    return BaselineLog(folder, "OWN")


def test_target_and_retain_model_that_are_alike_are_named(tmp_path):
    retain = log_of(tmp_path, forget_Q_A_Prob=0.35, forget_Q_A_ROUGE=0.4)
    alike = {"forget_Q_A_Prob": near(0.43), "forget_Q_A_ROUGE": near(0.5)}
    assert target.doubt("OWN", alike, retain).startswith(
        "Target and retain model do not differ in what was to be forgotten (forget_Q_A_Prob: "
        "target 0.430 [0.360, 0.500], retain model 0.350 [0.280, 0.420]), so no figure"
    )
    assert target.doubt("OWN", alike | {"forget_Q_A_ROUGE": near(0.6)}, retain) is None
    assert target.doubt("OWN", {"retain_Q_A_Prob": near(0.3)}, retain) is None
    assert target.doubt("OWN", alike, BaselineLog(None, "OWN")) is None


def test_the_summary_says_so_first_and_the_screen_shows_notes(tmp_path):
    values = {"collapsed": Value(1.0, note="utility 0.01 is below 0.5 of the target's 0.6")}
    write_log(tmp_path, "OWN", values, "Nothing can be said.")
    summary = json.loads((tmp_path / "OWN_SUMMARY.json").read_text())
    assert next(iter(summary.items())) == ("note", "Nothing can be said.")
    assert read_written(tmp_path, "OWN")[1] == "Nothing can be said."
    assert figures({"collapsed": 1.0}, [(tmp_path, "OWN")]) == (
        "Nothing can be said.",
        "collapsed  1  (utility 0.01 is below 0.5 of the target's 0.6)",
    )
    assert figures({}, [(tmp_path / "elsewhere", "OWN")]) == ("", "")
    assert read_written(tmp_path / "elsewhere", "OWN") == ({}, None)
