"""A log of another model must be of the same data, and of the same benchmark."""

from types import SimpleNamespace

import pytest

from unlora.errors import InputError
from unlora.evals.log_checks import check_logs
from unlora.evals.pass_plan import read_request
from unlora.results.baseline_log import BaselineLog
from unlora.results.eval_log import write_log
from unlora.results.value import Value

ANSWERS = ["Ada was born in Vardoy.", "Ivo keeps bees.", "It is copper."]
REQUESTS = [read_request("forget_Q_A_ROUGE", {"handler": "rouge", "inputs": {"answers": "forget"}})]


class Source(SimpleNamespace):
    def __len__(self):
        return len(self.references)


def log_of(folder, answers, kind="OWN"):
    rows = [{"rougeL_recall": 0.5, "input": "?", "ground_truth": text, "generation": ""}
            for text in answers]  # fmt: skip
    write_log(folder, kind, {"forget_Q_A_ROUGE": Value.mean(rows, "rougeL_recall")})
    return BaselineLog(folder, kind)


def check(log, *, is_qa=True, missing=()):
    check_logs(
        REQUESTS, {"reference": log, "target": BaselineLog(None, "OWN")},
        {"forget": Source(references=ANSWERS, is_qa=is_qa)}, dict.fromkeys(missing, "gone"),
    )  # fmt: skip


@pytest.mark.parametrize(
    "answers",
    [
        ANSWERS,
        [ANSWERS[1], "  ada was  BORN in Vardoy.", "It is a bit other."],  # another order, one row
        [],  # a log that keeps no answers
    ],
)
def test_logs_of_the_same_answers_pass(tmp_path, answers):
    check(log_of(tmp_path, answers))


def test_a_log_of_other_answers_is_refused_with_one_of_them(tmp_path):
    log = log_of(tmp_path, [ANSWERS[2], "Cem keeps owls.", "It is brass."])
    with pytest.raises(InputError) as error:
        check(log)
    assert "has 1 of the 3 answers of forget, and not e.g. 'ada was born in vardoy.'" in str(
        error.value
    )
    check(log, is_qa=False), check(log, missing=["forget"])  # nothing to compare


def test_a_log_of_another_benchmark_is_refused(tmp_path):
    log_of(tmp_path, ANSWERS, "TOFU")
    with pytest.raises(InputError, match="is a log of TOFU, and this evaluation is of OWN"):
        BaselineLog(tmp_path / "TOFU_EVAL.json", "OWN")
    renamed = (tmp_path / "TOFU_EVAL.json").rename(tmp_path / "gold.json")
    assert BaselineLog(renamed, "OWN").file == renamed
