"""What lm-evaluation-harness asks: planned before it is asked, kept once it is, and in silence."""

import copy
import logging
import random

import numpy as np
import pytest
import small_harness
import tiny
import torch
from small_harness import QUESTIONS

from unlora.evals import build_suites, evaluate_all, harness_model
from unlora.evals.eval_model import LazyModel
from unlora.evals.harness_model import HarnessModel
from unlora.model.guards import evaluation_is_pure

TASKS = ("bakers", "rivers")
REPLY = """task: reply
dataset_path: json
dataset_kwargs: {{data_files: {rows}}}
test_split: train
output_type: {output_type}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
"""
GENERATED = """generation_kwargs: {until: ["Q"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def write_tasks(folder, **other):
    """Those two tasks, and one of each other kind of request."""
    small_harness.write_tasks(folder, **other)
    rows = folder / "bakers.jsonl"
    reply = REPLY.format(rows=rows, output_type="generate_until") + GENERATED
    prose = REPLY.format(rows=rows, output_type="loglikelihood_rolling")
    (folder / "reply.yaml").write_text(reply)
    (folder / "prose.yaml").write_text(prose.replace("task: reply", "task: prose"))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("kept") / "tasks")


@pytest.fixture
def asked(monkeypatch):
    """The (task, number of requests) that a model is asked."""
    found = []
    original = HarnessModel._ask

    def watched(self, request, instances):
        for task in dict.fromkeys(one.task_name for one in instances):
            found.append((task, sum(one.task_name == task for one in instances)))
        return original(self, request, instances)

    monkeypatch.setattr(HarnessModel, "_ask", watched)
    return found


def build(tokenizer, folder, *, tasks=TASKS, template_args=None, cache=True, **args):
    args = {"include_path": str(folder), "batch_size": 4, "bootstrap_iters": 0} | args
    config = {"handler": "LMEvalEvaluator", "tasks": list(tasks), "simple_evaluate_args": args}
    (suite,) = build_suites(
        {"wmdp": config | {"output_dir": "unused", "cache": cache}},
        tokenizer=tokenizer,
        template_args=template_args or {},
    )
    return suite


def refuse():
    raise AssertionError("the model was loaded")


def subject(key="model"):
    return LazyModel(lambda: tiny.llama(max_position_embeddings=512), key)


def test_a_second_evaluation_asks_nothing_and_loads_no_model(
    tokenizer, folder, lm_eval, asked, tmp_path
):
    tasks = (*TASKS, "reply", "prose")
    suites = [build(tokenizer, folder, tasks=tasks)]
    first = evaluate_all(suites, subject(), tmp_path / "one", quiet=True)
    assert {name.split("/")[0] for name in first} == set(tasks)
    assert sorted(asked) == [("bakers", 15), ("prose", 5), ("reply", 5), ("rivers", 56)]
    asked.clear()
    suites = [build(tokenizer, folder, tasks=tasks)]
    again = evaluate_all(suites, LazyModel(refuse, "model"), tmp_path / "two", quiet=True)
    assert asked == [] and again == first and len(set(first.values())) > 3
    one, two = ((tmp_path / n / "LMEval_EVAL.json").read_bytes() for n in ("one", "two"))
    assert one == two


def test_the_plan_has_rows_and_tokens_of_each_task_and_asks_nothing(
    tokenizer, folder, lm_eval, asked
):
    tasks = (*TASKS, "reply", "prose")
    suite = build(tokenizer, folder, tasks=tasks, limit=3)
    plan = suite.plan(LazyModel(refuse, "model"))
    # one token for each byte; a choice comes after a space and its question
    letters = {
        name: sum(len(f"{q} {one}") for q, choices, _ in QUESTIONS[name][:3] for one in choices)
        for name in TASKS
    }
    questions = sum(len(question) for question, *_ in QUESTIONS["bakers"][:3])
    prose = sum(len(choices[0]) for _, choices, _ in QUESTIONS["bakers"][:3])
    assert {(row["pass"], row["data"]): (row["rows"], row["tokens"]) for row in plan} == {
        ("choices", "bakers"): (9, letters["bakers"]),
        ("choices", "rivers"): (12, letters["rivers"]),
        ("texts", "prose"): (3, prose),
        ("generate", "reply"): (3, questions + 3 * 5),
    }
    assert not any(row["kept"] for row in plan) and asked == []
    suite.evaluate(subject())
    assert all(row["kept"] for row in suite.plan(LazyModel(refuse, "model")))
    assert not any(row["kept"] for row in suite.plan(LazyModel(refuse, "other")))


def changed(place, value):
    """The questions of rivers with something of the third one changed."""
    questions = [list(question) for question in QUESTIONS["rivers"]]
    questions[2][place] = value
    return {"rivers": questions}


OTHER_ANSWERS = {"rivers": [(q, choices, (n + 1) % 4) for q, choices, n in QUESTIONS["rivers"]]}


ALL = {("bakers", 15), ("rivers", 56)}
OF_RIVERS = {("rivers", 56)}
TEMPLATE = {"apply_chat_template": True}
CHANGES = {
    "nothing": ({}, {}, set()),
    "a question": ({}, changed(0, "What is under the bridge?"), OF_RIVERS),
    "a choice": ({}, changed(1, ["a", "b", "c", "d"]), OF_RIVERS),
    "which choices are right": ({}, OTHER_ANSWERS, set()),
    "num_fewshot": ({"num_fewshot": 1}, {}, ALL),
    "limit": ({"limit": 4}, {}, {("bakers", 12), ("rivers", 16)}),
    "the template": ({"template_args": TEMPLATE}, {}, ALL),
    "batches": ({"batch_size": 1}, {}, set()),
    "cache": ({"cache": False}, {}, ALL),
}


@pytest.fixture
def kept(tokenizer, folder, lm_eval, own_cache):
    return build(tokenizer, folder).evaluate(subject())


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("name", CHANGES)
def test_what_depends_on_a_change_is_asked_again_and_nothing_else(
    name, tokenizer, folder, kept, asked, tmp_path
):
    settings, questions, expected = CHANGES[name]
    if questions:
        folder = write_tasks(tmp_path / "changed", **questions)
    found = build(tokenizer, folder, **settings).evaluate(subject())
    assert set(asked) == expected and len(asked) == len(expected)
    if name == "which choices are right":  # what lm-eval makes of the answers is not kept
        assert found["rivers/acc"] != kept["rivers/acc"]
        assert found["bakers/acc"] == kept["bakers/acc"]


@pytest.mark.slow
def test_examples_drawn_with_another_seed_and_another_system_prompt_are_asked_again(
    tokenizer, folder, lm_eval, asked
):
    args = {"num_fewshot": 2, "tasks": ["rivers"], "apply_chat_template": True}
    build(tokenizer, folder, **args).evaluate(subject())
    build(tokenizer, folder, **args).evaluate(subject())
    assert len(asked) == 1
    build(tokenizer, folder, **args, fewshot_random_seed=7).evaluate(subject())
    assert len(asked) == 2
    build(tokenizer, folder, **args, system_instruction="Be brief.").evaluate(subject())
    assert len(asked) == 3


@pytest.mark.slow
def test_another_model_tokenizer_harness_or_pass_is_asked_again(
    tokenizer, folder, kept, asked, monkeypatch
):
    build(tokenizer, folder).evaluate(subject("other"))
    assert set(asked) == ALL
    asked.clear()
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["bridge"])
    build(other, folder).evaluate(subject())
    assert set(asked) == ALL
    asked.clear()
    with monkeypatch.context() as patch:
        patch.setattr(harness_model.metadata, "version", lambda package: "0.4.14")
        build(tokenizer, folder).evaluate(subject())
    assert set(asked) == ALL
    asked.clear()
    monkeypatch.setitem(harness_model.VERSIONS, "choices", 2)
    build(tokenizer, folder).evaluate(subject())
    assert set(asked) == ALL


def test_a_model_in_training_is_asked_every_time(tokenizer, folder, kept, asked):
    model = tiny.llama(max_position_embeddings=512)
    for _ in range(2):
        assert build(tokenizer, folder).evaluate(model) == kept
        assert set(asked) == ALL
        asked.clear()


def test_a_model_is_loaded_with_the_random_state_of_the_run(tokenizer, folder, lm_eval):
    """lm-eval seeds before it asks, and a guard that begins with the model must see no change."""
    suite = build(tokenizer, folder)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    states, guards = [], []

    def load():
        states.append((torch.get_rng_state(), random.getstate()))
        model = tiny.llama(max_position_embeddings=512)
        guards.append(evaluation_is_pure(model))
        guards[0].__enter__()
        return model

    before = (torch.get_rng_state(), random.getstate())
    suite.evaluate(LazyModel(load, "model"))
    assert torch.equal(states[0][0], before[0]) and states[0][1] == before[1]
    assert guards[0].__exit__(None, None, None) is False  # it raises where something has changed


def test_lm_eval_is_silent_but_for_its_warnings(
    tokenizer, folder, tmp_path, monkeypatch, capfd, caplog
):
    pytest.importorskip("lm_eval", reason="lm-eval is an optional package")
    monkeypatch.chdir(tmp_path)  # where no repository is
    suite = build(tokenizer, folder, tasks=("rivers", "reply", "prose"), num_fewshot=1)
    capfd.readouterr()
    with caplog.at_level(logging.INFO):
        evaluate_all([suite], subject(), tmp_path, quiet=True)
    said = capfd.readouterr()
    assert said.out == "" and said.err == ""
    of_theirs = [one for one in caplog.records if one.name.startswith("lm_eval")]
    assert of_theirs and all(one.levelno >= logging.WARNING for one in of_theirs)
    assert "Overwriting default num_fewshot" in caplog.text


def test_the_evaluation_has_one_bar(tokenizer, folder, lm_eval, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    evaluate_all([build(tokenizer, folder)], subject(), tmp_path)
    assert "it/s" not in capfd.readouterr().err
