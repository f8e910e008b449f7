"""What a run left in its folder, as one value."""

import pytest
from report_runs import make, write_json

import unlora
from unlora.errors import InputError
from unlora.results.eval_log import KINDS, LogEntry, read_log, read_written, write_log
from unlora.results.run_result import read_run
from unlora.results.value import Value


def test_a_run_says_its_manifest_its_figures_with_intervals_and_its_lineage(tmp_path):
    folder = make(tmp_path / "run", "good")
    links = [{"path": "../full", "sha256": "a1"}, {"path": ".", "sha256": "b2"}]
    lineage = {"root": {"given": "org/base", "fingerprint": "f0"}, "links": links}
    write_json(folder / "lineage.json", lineage)
    write_json(folder / "manifest.json", {"command": "unlora unlearn", "seconds": 3.0})
    run = unlora.read_run(folder)
    assert run.folder == folder and run.manifest["command"] == "unlora unlearn"
    assert run.lineage == (("org/base", "f0"), ("../full", "a1"), (".", "b2"))
    entry = run.logs["TOFU"]["forget_Q_A_Prob"]
    assert entry.value == 0.2 and entry.interval == pytest.approx((0.15, 0.25))
    missing = run.logs["TOFU"]["privleak"]
    assert missing.value is None and missing.reason == "the retain model's log is missing"
    assert run.entry("MUSE", "privleak").value is None


def test_a_training_without_an_evaluation_is_a_run_without_figures(tmp_path):
    write_json(tmp_path / "manifest.json", {"mode": "finetune"})
    run = read_run(str(tmp_path))
    assert run.logs == {} and run.lineage == () and run.manifest == {"mode": "finetune"}


def test_a_folder_that_is_no_run_is_named_in_one_sentence(tmp_path):
    with pytest.raises(InputError, match="There is no folder .*nowhere.*Give run folders"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no run: neither manifest.json nor an evalua") as e:
        read_run(tmp_path)
    assert "\n" not in str(e.value)
    write_json(tmp_path / "TOFU_EVAL.json", {"a": 1})
    with pytest.raises(InputError, match="TOFU_EVAL.json' is no evaluation log"):
        read_run(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_again(kind, tmp_path):
    rows = [{"score": 0.25, "text": "a"}, {"score": float("nan"), "text": "b"}, {"score": 0.75}]
    values = {
        "mean": Value.mean(rows, "score"),
        "auc": Value(0.5, {"forget": [{"score": 1.0}], "holdout": [{"score": 2.0}]},
                     interval=(0.25, 0.75)),
        "broken": Value(1.0, note="repetition 0.9 is above 0.5"),
        "nothing": Value.missing("no log"),
    }  # fmt: skip
    write_log(tmp_path, kind, values, "Read this first.")
    log = read_log(tmp_path / f"{kind}_EVAL.json")
    assert read_written(tmp_path, kind) == (log, "Read this first.")
    for name, value in values.items():
        again = log[name].as_value()
        assert repr(again.value) == repr(value.value) and again.interval == value.interval
        assert (again.unscored, again.not_computed) == (value.unscored, value.not_computed)
        assert repr(again.per_example) == repr(value.per_example)
        assert log[name].note == value.note
    assert log["mean"].value == 0.5 and log["mean"].averaged_key == "score"


def test_rows_come_in_the_order_of_their_index():
    rows = {str(n): {"score": float(n)} for n in (10, 2, 0)}
    entry = LogEntry({"agg_value": 4.0, "value_by_index": rows})
    assert entry.column("score") == [0.0, 2.0, 10.0]
    assert entry.as_value().column("score").tolist() == [0.0, 2.0, 10.0]


@pytest.mark.parametrize("strange", [True, "0.5", [0.5], {"a": 1}, None, float("inf")])
def test_what_is_no_number_is_no_value(strange):
    entry = LogEntry({"agg_value": strange, "value_by_index": {"x": [1], "0": {"score": strange}}})
    assert entry.value is None and entry.interval is None and entry.column("score") == []
