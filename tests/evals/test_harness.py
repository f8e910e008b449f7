"""The handler for lm-evaluation-harness, with and without the package."""

import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_harness
import tiny
import torch
from peft import LoraConfig, get_peft_model

from unlora.cli.compose import composed
from unlora.cli.main import normalised
from unlora.errors import InputError
from unlora.evals import build_suites, check, harness_model
from unlora.evals.harness import values_of
from unlora.evals.passes import loglikelihood
from unlora.evals.processes import joined
from unlora.model.guards import GuardError, evaluation_is_pure
from unlora.recipes import train, training

CONFIG = {"handler": "LMEvalEvaluator", "tasks": ["rivers"]}


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """A folder with two tasks in the shape of WMDP and a group of both."""
    folder = small_harness.write_tasks(tmp_path_factory.mktemp("tasks"))
    (folder / "town.yaml").write_text(small_harness.GROUP)
    return folder


@pytest.fixture
def adapted():
    """A tied model with an adapter on its head too, as the default LoRA targets have it."""
    model = tiny.qwen2(max_position_embeddings=512)
    adapted = get_peft_model(model, LoraConfig(**tiny.LORA, task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return adapted


def build(tokenizer, folder=None, template_args=None, **change):
    args = {"include_path": str(folder)} | change.pop("simple_evaluate_args", {})
    config = CONFIG | ({"simple_evaluate_args": args} if folder else {}) | change
    (suite,) = build_suites(
        {"wmdp": config}, tokenizer=tokenizer, template_args=template_args or {}
    )
    return suite


def stock(model, tokenizer, folder, tasks=("rivers",)):
    """What the package says by itself."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )


def without_package(monkeypatch, name="lm_eval"):
    monkeypatch.setitem(sys.modules, name, None)  # importing it fails


def test_a_missing_package_is_said_before_there_is_a_model(tokenizer, monkeypatch, caplog):
    without_package(monkeypatch)
    with caplog.at_level(logging.WARNING):
        suite = build(tokenizer)
    assert "pip install 'unlora[lm-eval]'" in caplog.text
    assert list(suite.not_computable) == ["rivers/acc"]


def test_without_the_package_the_log_says_how_to_get_it(tokenizer, model, tmp_path, monkeypatch):
    without_package(monkeypatch)
    assert build(tokenizer).evaluate(model, tmp_path) == {}
    log = json.loads((tmp_path / "LMEval_EVAL.json").read_text())
    assert "pip install 'unlora[lm-eval]'" in log["rivers/acc"]["not_computed"]


def test_a_broken_package_speaks_for_itself(tokenizer, lm_eval, monkeypatch):
    without_package(monkeypatch, "lm_eval.models.huggingface")
    words = build(tokenizer).not_computable["rivers/acc"]
    assert "lm_eval.models.huggingface" in words and "pip install" not in words


@pytest.mark.slow
def test_it_gives_what_the_package_gives_by_itself(tokenizer, tasks, lm_eval, monkeypatch):
    model = tiny.llama(max_position_embeddings=512)
    theirs = stock(model, tokenizer, tasks)
    expected = [one["resps"] for one in theirs["samples"]["rivers"]]
    kept = []

    def simple_evaluate(**given):
        kept.append(lm_eval.evaluator.simple_evaluate(**given))
        return kept[0]

    monkeypatch.setattr(lm_eval, "simple_evaluate", simple_evaluate)
    suite = build(tokenizer, tasks)
    assert not suite.not_computable
    assert suite.evaluate(model) == {"rivers/acc": theirs["results"]["rivers"]["acc,none"]}
    found = [one["resps"] for one in kept[0]["samples"]["rivers"]]
    assert len({str(resps) for resps in expected}) > 10  # the questions differ
    # choices after one question are read together here, which rounds otherwise
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_long_question_loses_its_beginning_as_in_the_package(tokenizer, tasks, lm_eval):
    model = tiny.llama(max_position_embeddings=24)
    theirs = stock(model, tokenizer, tasks)["results"]["rivers"]["acc,none"]
    assert build(tokenizer, tasks).evaluate(model) == {"rivers/acc": theirs}


def test_an_adapter_on_a_tied_head_stays_unmerged_and_trainable(tokenizer, tasks, lm_eval, adapted):
    probe = torch.arange(1, 20)[None]
    adapted.train()
    before = adapted(probe).logits
    with pytest.raises((KeyError, GuardError)), evaluation_is_pure(adapted):
        stock(adapted, tokenizer, tasks)
    adapted.train()
    suite = build(tokenizer, tasks)
    np.random.rand(), torch.rand(1)  # no longer what the harness seeds
    with evaluation_is_pure(adapted):
        with_adapter = suite.evaluate(adapted)
    assert torch.equal(adapted(probe).logits, before) and "tie_weights" not in vars(adapted)
    adapted(probe, labels=probe).loss.backward()
    trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert trainable and all("lora" in name for name in trainable)
    assert all(p.grad is not None for p in trainable.values())
    with adapted.disable_adapter():
        assert suite.evaluate(adapted) != with_adapter  # so the adapter was asked


@pytest.mark.parametrize("size", [1, 3])
def test_the_batch_size_is_the_most_that_goes_through_at_once(tokenizer, tasks, lm_eval, size):
    model = tiny.llama(max_position_embeddings=512)
    suite = build(tokenizer, tasks, simple_evaluate_args={"batch_size": size})
    suite.evaluate(model)  # which finds out what the architecture allows
    seen = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    suite.evaluate(model)
    handle.remove()
    assert max(seen) == size


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("apply", [None, True, False])
def test_the_chat_template_is_as_the_model_or_the_config_says(
    tokenizer, tasks, lm_eval, monkeypatch, apply
):
    asked = []

    def score(model, rows, *args, **kwargs):
        asked.extend(tokenizer.decode(row.input_ids) for row in rows)
        return original(model, rows, *args, **kwargs)

    original = harness_model.score
    monkeypatch.setattr(harness_model, "score", score)
    suite = build(
        tokenizer,
        tasks,
        {"apply_chat_template": True, "system_prompt": "Be brief."},
        simple_evaluate_args={"apply_chat_template": apply, "num_fewshot": 2, "limit": 3},
    )
    suite.evaluate(tiny.llama(max_position_embeddings=1024))
    assert len(asked) == 3 * 4
    turns = asked[0].count("<|user|>"), asked[0].count("<|assistant|>")
    assert turns == ((0, 0) if apply is False else (3, 3))
    assert ("Be brief." in asked[0]) == (apply is not False)


def test_a_template_that_is_not_there_is_refused(tokenizer, tasks, lm_eval, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(InputError, match="has no chat template. Set eval.wmdp.simple_evaluate"):
        build(tokenizer, tasks, {"apply_chat_template": True})


@pytest.mark.slow
def test_a_dead_model_has_no_accuracy(tokenizer, tasks, lm_eval, tmp_path):
    model = tiny.llama(max_position_embeddings=512)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    alone = stock(model, tokenizer, tasks)["results"]["rivers"]["acc,none"]
    assert alone == 4 / 14  # the questions whose answer is the first choice
    summary = build(tokenizer, tasks, tasks=["town"]).evaluate(model, tmp_path)
    assert set(summary) == {"town/acc", "rivers/acc", "bakers/acc"}
    assert all(np.isnan(value) for value in summary.values())
    log = json.loads((tmp_path / "LMEval_EVAL.json").read_text())
    assert log["town/acc"]["agg_value"] is None and log["town/acc"]["unscored"] == 19
    assert "logits are not finite" in log["rivers/acc"]["not_scored"]


def test_the_log_has_interval_and_number_of_questions(tokenizer, tasks, lm_eval, tmp_path):
    model = tiny.llama(max_position_embeddings=512)
    summary = build(tokenizer, tasks, tasks=["town"]).evaluate(model, tmp_path)
    log = json.loads((tmp_path / "LMEval_EVAL.json").read_text())
    rivers, town = log["rivers/acc"], log["town/acc"]
    assert 0 < rivers["agg_value"] < 1 and rivers["note"] == "14 questions"
    assert town["note"] == "19 questions"
    weighted = (14 * summary["rivers/acc"] + 5 * summary["bakers/acc"]) / 19
    assert summary["town/acc"] == pytest.approx(weighted)
    # the standard error of a mean of n answers that are right or wrong: sqrt(p (1-p) / (n-1))
    p = rivers["agg_value"]
    error = (p * (1 - p) / 13) ** 0.5
    expected = [max(0, p - 1.96 * error), min(1, p + 1.96 * error)]
    assert rivers["interval95"] == pytest.approx(expected, abs=1e-4)


def test_a_number_without_a_standard_error_has_no_interval():
    found = {"results": {"a": {"acc,none": 0.5, "acc_stderr,none": "N/A", "sample_len": 1,
                               "exact_match,strict": 0.25, "alias": "a"}}}  # fmt: skip
    values = values_of(found)
    assert {name: value.value for name, value in values.items()} == {
        "a/acc": 0.5, "a/exact_match,strict": 0.25,
    }  # fmt: skip
    assert values["a/acc"].interval is None


def test_local_tasks_do_not_wait_for_those_of_the_package(
    tokenizer, tasks, lm_eval, monkeypatch, tmp_path
):
    from lm_eval.tasks import TaskManager

    read = []
    original = TaskManager.__init__

    def init(self, *args, include_defaults=True, **kwargs):
        read.append(include_defaults)
        original(self, *args, include_defaults=False, **kwargs)

    monkeypatch.setattr(TaskManager, "__init__", init)
    build(tokenizer, tasks, tasks=["town"])
    assert read == [False]
    with pytest.raises(InputError, match="Unknown task .*'rivrs'. Did you mean 'rivers'"):
        build(tokenizer, tasks, tasks=["rivrs"])
    assert read == [False, False, True]
    (tmp_path / "more.yaml").write_text("group: more\ntask: [rivers, elsewhere]\n")
    with pytest.raises(InputError, match="a group names 'elsewhere', which is no task"):
        folders = {"include_path": [str(tasks), str(tmp_path)]}
        build(tokenizer, tmp_path, tasks=["more"], simple_evaluate_args=folders)
    assert read[3:] == [False, True]  # the package might have the member that is not local


@pytest.mark.slow
def test_the_default_tasks_exist(lm_eval):
    from lm_eval.tasks import TaskManager

    default = composed("unlearn", ["experiment=unlearn/wmdp/lora"]).eval.lm_eval.tasks
    named = composed("eval", ["experiment=eval/tofu/lora", "eval=lm_eval"]).eval.lm_eval.tasks
    assert {*default, *named} <= {*TaskManager().all_tasks}


def test_data_that_are_not_there_are_said_before_the_model(tokenizer, tmp_path, lm_eval):
    (tmp_path / "rivers.yaml").write_text(small_harness.task("rivers", tmp_path / "no.jsonl"))
    with pytest.raises(InputError, match="eval.wmdp: the tasks cannot be read: .*no.jsonl"):
        build(tokenizer, tmp_path)


def test_a_task_given_twice_is_refused(tokenizer, tasks, lm_eval):
    with pytest.raises(InputError, match="Duplicate task 'rivers'"):
        build(tokenizer, tasks, tasks=["town", "rivers"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tasks": []}, "must be a list of tasks"),
        ({"tasks": [{"task": "a"}]}, "a task is given by its name"),
        ({"task": ["a"]}, "Did you mean 'tasks'"),
        ({"simple_evaluate_args": {"num_fewshots": 1}}, "Did you mean 'num_fewshot'"),
        ({"simple_evaluate_args": {"use_cache": "x"}}, "would give one model those of another"),
        ({"simple_evaluate_args": {"batch_size": 0}}, "batch_size is 0; it must be a number"),
        ({"simple_evaluate_args": {"batch_size": True}}, "batch_size is True"),
        ({"simple_evaluate_args": {"include_path": ["/not/there"]}}, "no folder '/not/there'"),
    ],
)
def test_wrong_config_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        check({"wmdp": CONFIG | change})


@pytest.mark.slow
def test_unlearning_wmdp_ends_with_its_accuracy(tasks, lm_eval, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.qwen2(max_position_embeddings=512).save_pretrained("root")
    tiny.tokenizer().save_pretrained("root")
    corpora = tmp_path / "data" / "wmdp-corpora"
    corpora.mkdir(parents=True)
    for part, text in (("forget", "The Varn rises in the hills."), ("retain", "Bread is old.")):
        row = json.dumps({"text": text})
        (corpora / f"cyber-{part}-corpus.jsonl").write_text(f"{row}\n{row}\n")
    words = [
        "experiment=unlearn/wmdp/lora", "trainer=NPO", "paths.datasets_dir=data",
        "model.model_args.pretrained_model_name_or_path=root",
        "model.tokenizer_args.pretrained_model_name_or_path=root",
        "model.model_args.torch_dtype=float32", "model.lora_config.r=4",
        "trainer.args.max_steps=2", "trainer.args.learning_rate=1e-2",
        "trainer.args.disable_tqdm=true", "eval.lm_eval.tasks=[rivers]",
        f"eval.lm_eval.simple_evaluate_args.include_path={tasks}",
    ]  # fmt: skip
    trained = []
    evaluate_all = training.evaluate_all
    monkeypatch.setattr(
        training,
        "evaluate_all",
        lambda suites, model, *args: trained.append(model) or evaluate_all(suites, model, *args),
    )
    summary = train.run(composed("unlearn", normalised(words)))
    run = tmp_path / "saves" / "unlearn" / "unlearn_wmdp_lora"
    log = json.loads((run / "evals" / "LMEval_EVAL.json").read_text())
    assert log["rivers/acc"]["agg_value"] == summary["rivers/acc"]
    assert 0 <= summary["rivers/acc"] <= 1 and log["rivers/acc"]["note"] == "14 questions"
    guards = json.loads((run / "manifest.json").read_text())["guards"]
    assert "evaluation is pure" in guards and (run / "adapter_model.safetensors").is_file()
    (model,) = trained
    ids = torch.arange(1, 20)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if p.requires_grad]
    assert len(grads) == 2 * 15 and all(grad is not None for grad in grads)


SECOND = """
import sys
sys.path.insert(0, sys.argv[1])
import test_harness, torch
from pathlib import Path
from unlora.evals.processes import joined
torch.set_num_threads(1)
print("ready", flush=True)
with joined():
    print(test_harness.counted(Path(sys.argv[2]), Path(sys.argv[3])))
"""


def counted(folder, output_dir):
    """How many batches this process has asked, and what it says in the end."""
    batches, ask = [], loglikelihood._Asker.ask
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loglikelihood._Asker,
            "ask",
            lambda self, batch: batches.append(batch) or ask(self, batch),
        )
        suite = build(
            tiny.tokenizer(), folder, tasks=["town"], simple_evaluate_args={"batch_size": 1}
        )
        summary = suite.evaluate(tiny.llama(max_position_embeddings=512), output_dir)
    return json.dumps([len(batches), summary])


@pytest.mark.slow
def test_two_processes_say_what_one_says(tasks, lm_eval, tmp_path, monkeypatch):
    batches, expected = json.loads(counted(tasks, tmp_path / "one"))
    assert 0 < expected["town/acc"] < 1
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    tests = Path(__file__).parent
    path = {"PYTHONPATH": str(tests.parent / "helpers")}
    cache = {"HF_DATASETS_CACHE": str(tmp_path / "second")}
    second = subprocess.Popen(
        [sys.executable, "-c", SECOND, str(tests), str(tasks), str(tmp_path / "two")],
        env=os.environ | group | path | cache | {"RANK": "1", "LOCAL_RANK": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert second.stdout.readline() == "ready\n", second.stderr.read()[-3000:]
    for key, value in (group | {"RANK": "0", "LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(key, value)
    with joined():
        shares = [json.loads(counted(tasks, tmp_path / "two"))]
    output, errors = second.communicate(timeout=120)
    assert second.returncode == 0, errors[-3000:]
    shares.append(json.loads(output))
    assert [summary for _, summary in shares] == [expected, expected]
    assert all(0 < share < batches for share, _ in shares)
    logs = [(tmp_path / folder / "LMEval_EVAL.json").read_text() for folder in ("two", "one")]
    assert logs[0] == logs[1]
