"""The handler for lm-evaluation-harness, with and without the package."""

import json
import sys

import pytest

from unlora.errors import InputError
from unlora.evals import build_suites, check

CONFIG = {"handler": "LMEvalEvaluator", "tasks": ["wmdp_cyber"]}


def test_without_the_package_the_log_says_how_to_get_it(tokenizer, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # importing it fails
    (suite,) = build_suites({"wmdp": CONFIG}, tokenizer=tokenizer, template_args={})
    assert suite.evaluate(model, tmp_path) == {}
    log = json.loads((tmp_path / "LMEval_EVAL.json").read_text())
    assert "pip install 'unlora[lm-eval]'" in log["wmdp_cyber/acc"]["not_computed"]


def test_a_task_of_ones_own_runs_unmerged_and_leaves_the_modes(tokenizer, model, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is an optional package")
    rows = [{"q": f"Is {n} even?", "choices": ["yes", "no"], "answer": n % 2} for n in range(6)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\noutput_type: multiple_choice\ntest_split: train\n"
        f"dataset_kwargs: {{data_files: {data}}}\n"
        "doc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    config = CONFIG | {"tasks": ["mine"], "simple_evaluate_args": {"include_path": str(tmp_path)}}
    (suite,) = build_suites(
        {"mine": config}, tokenizer=tokenizer, template_args={"apply_chat_template": True}
    )
    model.train()
    summary = suite.evaluate(model)
    assert 0 <= summary["mine/acc"] <= 1
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [({"tasks": []}, "must be a list of tasks"), ({"task": ["a"]}, "Did you mean 'tasks'")],
)
def test_wrong_config_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        check({"wmdp": CONFIG | change})
