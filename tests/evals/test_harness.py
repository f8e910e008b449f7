"""The handler for lm-evaluation-harness, with and without the package."""

import json
import logging
import random
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
import torch

from unlora.errors import InputError
from unlora.evals import build_suites, check
from unlora.model.guards import GuardError, evaluation_is_pure

CONFIG = {"handler": "LMEvalEvaluator", "tasks": ["wmdp_cyber"]}


def build(tokenizer, config=CONFIG):
    (suite,) = build_suites({"wmdp": config}, tokenizer=tokenizer, template_args={})
    return suite


def install(monkeypatch, name, **content):
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def harness(monkeypatch):
    """A stand-in for lm-evaluation-harness that seeds everything, as the real one does."""

    def simple_evaluate(*, model, tasks, **settings):
        random.seed(0), np.random.seed(1234), torch.manual_seed(1234)
        model.eval()
        return {"results": {task: {"acc,none": 0.25, "alias": task} for task in tasks}}

    install(monkeypatch, "lm_eval", simple_evaluate=simple_evaluate)
    install(monkeypatch, "lm_eval.models")
    install(monkeypatch, "lm_eval.models.huggingface", HFLM=lambda pretrained, **_: pretrained)
    install(monkeypatch, "lm_eval.tasks", TaskManager=lambda **_: None)
    return simple_evaluate


def test_the_harness_leaves_modes_and_random_state(tokenizer, model, harness, tmp_path):
    model.train()
    with pytest.raises(GuardError), evaluation_is_pure(model):
        harness(model=model, tasks=[])
    model.train()
    random.random(), np.random.rand(), torch.rand(1)  # no longer what the harness seeds
    with evaluation_is_pure(model):
        assert build(tokenizer).evaluate(model, tmp_path) == {"wmdp_cyber/acc": 0.25}


def test_a_missing_package_is_said_before_there_is_a_model(tokenizer, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with caplog.at_level(logging.WARNING):
        suite = build(tokenizer)
    assert "pip install 'unlora[lm-eval]'" in caplog.text
    assert list(suite.not_computable) == ["wmdp_cyber/acc"]


def test_a_present_package_is_not_warned_about(tokenizer, harness, caplog):
    with caplog.at_level(logging.WARNING):
        assert build(tokenizer).not_computable == {}
    assert not caplog.text


def test_a_broken_package_speaks_for_itself(tokenizer, model, harness, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    build(tokenizer).evaluate(model, tmp_path)
    log = json.loads((tmp_path / "LMEval_EVAL.json").read_text())
    words = log["wmdp_cyber/acc"]["not_computed"]
    assert "lm_eval.tasks" in words and "pip install" not in words


def test_without_the_package_the_log_says_how_to_get_it(tokenizer, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # importing it fails
    suite = build(tokenizer)
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
    with evaluation_is_pure(model):
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
