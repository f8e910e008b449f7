import json

import pytest
from report_runs import log, make, write_json

from unlora.errors import InputError
from unlora.report.runs import Entry, read, read_rows
from unlora.results.eval_log import LogEntry
from unlora.results.run_result import find_logs


def test_seeds_of_one_name_are_one_row_with_a_mean(tmp_path):
    made = [
        Entry("NPO", "method", make(tmp_path / str(seed), "good", shift=shift), seed)
        for seed, shift in ((0, 0.0), (1, 0.1))
    ]
    (row,) = read_rows(made)
    cell = row.cell("TOFU", "forget_Q_A_Prob")
    assert cell.mean == pytest.approx(0.25) and cell.seeds == pytest.approx((0.2, 0.3))
    assert cell.interval == pytest.approx((0.15, 0.25)), "the mean of the seeds' bounds"


def test_a_metric_that_a_seed_lacks_has_no_mean_and_says_why(tmp_path):
    folders = [make(tmp_path / str(seed), "good") for seed in (0, 1)]
    entries = log("good")
    del entries["model_utility"]
    write_json(folders[1] / "evals" / "TOFU_EVAL.json", entries)
    (row,) = read_rows([Entry("x", "method", f, i) for i, f in enumerate(folders)])
    assert row.cell("TOFU", "model_utility").mean is None
    assert row.cell("TOFU", "model_utility").seeds == (0.66, None)
    assert row.cell("TOFU", "privleak").note == "the retain model's log is missing"


def test_target_comes_first_and_then_gold(tmp_path):
    given = [("b", "good", "method"), ("g", "gold", "gold"), ("t", "target", "target")]
    rows = read_rows([Entry(n, role, make(tmp_path / n, kind)) for n, kind, role in given])
    assert [row.name for row in rows] == ["t", "g", "b"]


@pytest.mark.parametrize(
    "place", ["TOFU_EVAL.json", "evals/TOFU_EVAL.json", "checkpoint-20/evals/TOFU_EVAL.json",
              "evals_forget10/TOFU_EVAL.json"],
)  # fmt: skip
def test_a_log_is_found_wherever_the_field_puts_it(place, tmp_path):
    write_json(tmp_path / place, log("good"))
    assert find_logs(tmp_path) == {"TOFU": tmp_path / place}


def test_the_last_checkpoint_counts(tmp_path):
    for number in (5, 20, 100):
        write_json(tmp_path / f"checkpoint-{number}" / "evals" / "TOFU_EVAL.json", log("good"))
    assert find_logs(tmp_path)["TOFU"].parts[-3] == "checkpoint-100"


def test_logs_of_several_splits_are_not_chosen_between(tmp_path):
    for split in ("forget01", "forget10"):
        write_json(tmp_path / f"evals_{split}" / "TOFU_EVAL.json", log("good"))
    with pytest.raises(InputError, match="several splits.*evals_forget01, .*evals_forget10"):
        find_logs(tmp_path)


def test_a_foreign_run_says_its_settings_and_curves(tmp_path):
    write_json(tmp_path / "TOFU_EVAL.json", log("good"))
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text("trainer: {handler: NPO}\npath: ${x.y}\n")
    state = {"log_history": [{"step": 1, "loss": 2.0}]}
    write_json(tmp_path / "checkpoint-9" / "trainer_state.json", state)
    found = read(Entry("x", "method", tmp_path))
    assert found.run.config["trainer"] == {"handler": "NPO"}
    assert found.run.manifest["training"] == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize(
    "content, message",
    [("{", "is not JSON"), ("[1]", "holds no mapping"), ('{"a": 1}', "no entry with agg_value"),
     ("[" * 100_000, "is not JSON")],
)  # fmt: skip
def test_a_broken_log_is_named(content, message, tmp_path):
    (tmp_path / "TOFU_EVAL.json").write_text(content)
    with pytest.raises(InputError, match=f"TOFU_EVAL.json.*{message}"):
        read(Entry("x", "method", tmp_path))


def test_a_folder_without_a_log_or_without_a_folder_is_an_error(tmp_path):
    with pytest.raises(InputError, match="holds no evaluation log"):
        read(Entry("x", "method", tmp_path))
    with pytest.raises(InputError, match="There is no folder"):
        read(Entry("x", "method", tmp_path / "nowhere"))
    with pytest.raises(InputError, match="nothing to report"):
        read_rows([])


def test_two_runs_of_one_name_and_two_targets_are_errors(tmp_path):
    a, b = make(tmp_path / "a", "good"), make(tmp_path / "b", "target")
    with pytest.raises(InputError, match="2 runs are called 'x'"):
        read_rows([Entry("x", "method", a), Entry("x", "method", b)])
    with pytest.raises(InputError, match="2 runs are the target: a, b"):
        read_rows([Entry("a", "target", a), Entry("b", "target", b)])


def test_a_log_without_intervals_gets_them_from_its_rows():
    rows = {str(i): {"score": float(i % 2), "other": 7.0} for i in range(100)}
    entry = LogEntry({"agg_value": 0.5, "value_by_index": rows})
    low, high = entry.interval
    # standard error of 100 coin flips is 0.05
    assert low == pytest.approx(0.4, abs=0.02) and high == pytest.approx(0.6, abs=0.02)
    assert entry.written_interval is None, "the log has none"
    other = LogEntry({"agg_value": 0.3, "value_by_index": rows})
    assert other.interval is None, "not a mean of its rows"
    assert LogEntry({"agg_value": 0.5}).interval is None
    again = LogEntry({"agg_value": 0.5, "value_by_index": rows})
    assert json.dumps(again.interval) == f"[{low}, {high}]"
