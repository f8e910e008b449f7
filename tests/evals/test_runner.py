"""What was asked once is not asked again, and what has changed is asked anew, nothing else."""

import copy
import json
import shutil
from dataclasses import replace
from typing import NewType

import numpy as np
import pytest
import small_tofu
import tiny
import torch

from unlora.evals import build_suites, passes
from unlora.evals.eval_model import LazyModel
from unlora.evals.metrics import METRICS as HANDLERS
from unlora.evals.metrics import metric
from unlora.evals.passes import text_classifier
from unlora.evals.passes.declaration import PASSES, Pass, PassInput, register
from unlora.evals.runner import PassRunner, _packed
from unlora.results.value import Value
from unlora.runs.hashes import digest

METRICS = (
    "forget_Q_A_Prob", "forget_Q_A_PERT_Prob", "forget_Q_A_ROUGE", "mia_loss", "mia_gradnorm",
    "mia_reference", "forget_fluency", "forget_Q_A_gibberish", "representation_similarity",
    "privleak_bounded",
)  # fmt: skip
CHANGING = "mia_min_k"  # what privleak_bounded looks at
OF_ROOT = {("score_root", "forget"), ("score_root", "holdout"), ("hidden_root", "forget"),
           ("reread", "forget")}  # fmt: skip
OF_MODEL = {("score", "forget"), ("score", "forget_perturbed"), ("score", "holdout"),
            ("hidden", "forget"), ("gradient_norm", "forget"), ("gradient_norm", "holdout"),
            ("generate", "forget"), ("legible", "forget")}  # fmt: skip
ALL = OF_MODEL | OF_ROOT


class Bench:
    """One small evaluation, to be run again with something changed."""

    def __init__(self, folder, tokenizer):
        self.folder, self.tokenizer = folder, tokenizer
        self.data = small_tofu.write_splits(folder / "data" / "TOFU")
        every = small_tofu.every_metric()
        self.metrics = {name: every[name] for name in (*METRICS, CHANGING)}
        self.classifier = small_tofu.save_classifier(folder / "classifier", tokenizer)
        self.model = tiny.adapted()

    def suite(self, *, data=None, tokenizer=None, template=small_tofu.TEMPLATE_ARGS, **changes):
        config = small_tofu.eval_config(data or self.data)
        config["tofu"] |= {
            "metrics": self.metrics,
            "fluency_classifier": self.classifier,
            "panel": ["forget_Q_A_Prob"],
        } | changes
        (suite,) = build_suites(
            config, tokenizer=tokenizer or self.tokenizer, template_args=template, prepare=False
        )
        return suite

    def subject(self, key="model", root_key="root"):
        return LazyModel(lambda: self.model, key, root_key)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An evaluation whose answers are kept."""
    folder = tmp_path_factory.mktemp("answers")
    bench = Bench(folder, tiny.tokenizer())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNLORA_CACHE", str(folder / "cache"))
        bench.suite().evaluate(bench.subject(), folder / "log")
    return bench


@pytest.fixture
def bench(base, own_cache, tmp_path):
    """The same, with a copy of what is kept."""
    shutil.copytree(base.folder / "cache", tmp_path / "cache")
    return base


@pytest.fixture
def asked(monkeypatch):
    found = []
    original = PassRunner._run

    def watched(self, name, data):
        found.extend((name, one) for one in data)
        return original(self, name, data)

    monkeypatch.setattr(PassRunner, "_run", watched)
    return found


def refuse():
    raise AssertionError("the model was loaded")


def test_a_second_evaluation_asks_no_model_and_writes_the_same_log(bench, asked, tmp_path):
    subject = LazyModel(refuse, "model", "root")
    plan = bench.suite().plan(subject)
    assert {row["pass"] for row in plan if not row["kept"]} == {"reread", "legible"}
    bench.suite().evaluate(subject, tmp_path / "again")
    assert asked == []
    for file in ("TOFU_EVAL.json", "TOFU_SUMMARY.json"):
        assert (tmp_path / "again" / file).read_bytes() == (
            bench.folder / "log" / file
        ).read_bytes()


def test_a_retain_log_added_later_changes_metrics_and_asks_nothing(bench, asked, tmp_path):
    before = json.loads((bench.folder / "log" / "TOFU_SUMMARY.json").read_text())
    assert "privleak_bounded" in before["not_computed"]
    suite = bench.suite(retain_logs_path=str(bench.folder / "log"))
    after = suite.evaluate(LazyModel(refuse, "model", "root"))
    assert asked == [] and after["privleak_bounded"] == 1
    assert {k: v for k, v in after.items() if k in before} == {
        k: v for k, v in before.items() if k in after
    }


def test_a_model_without_a_name_is_asked_every_time(bench, asked):
    bench.suite().evaluate(bench.model)
    assert set(asked) == ALL
    asked.clear()
    bench.suite(cache=False).evaluate(bench.subject())
    assert set(asked) == ALL


def other_data(bench, tmp_path, change):
    folder = tmp_path / "changed" / "TOFU"
    shutil.copytree(bench.data, folder)
    rows = [small_tofu.qa(n) for n in range(5)]
    change(rows)
    small_tofu.write_rows(folder / "forget10_perturbed.json", rows)
    return {"data": folder}


def other_template(bench, tmp_path):
    tokenizer = copy.deepcopy(bench.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>\n", "<|end|> ")
    assert tokenizer.chat_template != bench.tokenizer.chat_template
    return {"tokenizer": tokenizer}


def answers_of(name):
    return {question for question in ALL if question[0] == name}


OF_FORGET = {question for question in ALL if question[1] == "forget"}
CHANGES = {
    "nothing": (lambda bench, path: {}, set()),
    "batches": (lambda bench, path: {"batch_size": 1, "token_budget": 50}, set()),
    "an answer": (
        lambda bench, path: other_data(bench, path, lambda r: r[3].update(answer="Nothing.")),
        OF_FORGET,
    ),
    "a question": (
        lambda bench, path: other_data(bench, path, lambda r: r[3].update(question="Who?")),
        OF_FORGET | {("score", "forget_perturbed")},
    ),
    "a wrong answer": (
        lambda bench, path: other_data(bench, path, lambda r: r[3]["perturbed_answer"].pop()),
        {("score", "forget_perturbed")},
    ),
    "a column nobody reads": (
        lambda bench, path: other_data(bench, path, lambda r: r[3].update(number=1)),
        set(),
    ),
    "the order of rows": (
        lambda bench, path: other_data(bench, path, lambda r: r.reverse()),
        OF_FORGET | {("score", "forget_perturbed")},
    ),
    "the template": (other_template, ALL),
    "a system prompt": (
        lambda bench, path: {"template": small_tofu.TEMPLATE_ARGS | {"system_prompt": "Be."}},
        ALL,
    ),
    # what the texts are now is read again, as they are others
    "max_new_tokens": (
        lambda bench, path: {"max_new_tokens": 5},
        answers_of("generate") | answers_of("reread") | answers_of("legible"),
    ),
    "gradient_modules": (
        lambda bench, path: {"gradient_modules": ["down_proj"]},
        answers_of("gradient_norm"),
    ),
    "the classifier's weights": (
        lambda bench, path: {
            "fluency_classifier": small_tofu.save_classifier(
                path / "other", bench.tokenizer, seed=1
            )
        },
        answers_of("legible"),
    ),
    "the classifier's place": (
        lambda bench, path: {
            "fluency_classifier": str(shutil.copytree(bench.classifier, path / "moved"))
        },
        set(),
    ),
    "fluency_label": (lambda bench, path: {"fluency_label": "noise"}, answers_of("legible")),
}


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("name", CHANGES)
def test_what_depends_on_a_change_is_asked_again_and_nothing_else(name, bench, asked, tmp_path):
    change, expected = CHANGES[name]
    bench.suite(**change(bench, tmp_path)).evaluate(bench.subject())
    assert set(asked) == expected and len(asked) == len(expected)


def test_another_commit_of_a_classifier_is_asked_again(bench, asked, monkeypatch):
    said = text_classifier.fluency_prob
    local = lambda name, *args, **kwargs: said(bench.classifier, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(text_classifier, "fluency_prob", local)
    suite = bench.suite(fluency_classifier="someone/clean")
    for commit, expected in (("a", 1), ("a", 0), ("b", 1), (None, 1), (None, 1)):
        known = commit and f"someone/clean@{commit}"
        monkeypatch.setattr(text_classifier, "identity_of", lambda name, known=known: known)
        asked.clear()
        suite.evaluate(bench.subject())
        assert asked == [("legible", "forget")] * expected


def test_other_weights_are_asked_again(bench, asked):
    bench.suite().evaluate(bench.subject(key="other"))
    # the root is the same, and so are the texts that it reads again
    assert set(asked) == OF_MODEL
    asked.clear()
    bench.suite().evaluate(bench.subject(key="other", root_key="other root"))
    assert set(asked) == OF_ROOT


def test_every_pass_is_asked_here_but_the_one_of_audits():
    assert set(PASSES) == {name for name, _ in ALL} | {"sample"}


@pytest.mark.default_cases(3)
@pytest.mark.parametrize("name", sorted({name for name, _ in ALL}))
def test_a_pass_that_comes_to_answer_something_else_is_asked_again_alone(
    name, bench, asked, monkeypatch
):
    newer = replace(PASSES[name], version=PASSES[name].version + 1)
    monkeypatch.setitem(PASSES._entries, name, newer)
    bench.suite().evaluate(bench.subject())
    assert set(asked) == answers_of(name) != set()


# version and model of each pass as its answers have been cached since 0.1, and the arrays of a file
CACHED = {
    "score": (1, "model", "logp hit mean var lengths ended cut texts"),
    "score_root": (1, "root", "logp hit mean var lengths ended cut texts"),
    "reread": (1, "root", "logp hit mean var lengths ended cut texts"),
    "generate": (2, "model", "said asked cut"),
    "legible": (1, "model", "value cut"),
    "gradient_norm": (1, "model", "value cut texts"),
    "hidden": (1, "model", "value cut texts"),
    "hidden_root": (1, "root", "value cut texts"),
}


@pytest.mark.parametrize("name, data", sorted(ALL))
def test_answers_that_were_cached_before_are_found_under_their_keys(name, data, bench):
    suite = bench.suite()
    runner = suite._runner(LazyModel(refuse, "model", "root"), suite._chosen(None))
    runner.answer([("generate", "forget")])
    version, model, arrays = CACHED[name]
    source = suite.sources[data]
    chat, rows = source.chat, suite._chosen(None)[data]
    setting = {
        "generate": [8, sorted({chat.end_id, chat.tokenizer.eos_token_id} - {None}), []],
        "legible": [passes.identity_of(bench.classifier), None],
        "gradient_norm": "all-linear",
    }.get(name)
    content = source.fingerprint(rows)
    if name in ("reread", "legible"):
        texts = [one.text for one in runner.answers["generate", "forget"]]
        content = [content, digest(texts)]
    key = digest(version, name, model, setting, content)
    assert runner.key(name, data) == key
    assert list(runner.cache.read(key)) == arrays.split()


Lengths = NewType("Lengths", list)


@pytest.mark.parametrize("needs", ["self", "none"])
def test_a_new_pass_is_one_object_that_plan_cache_and_metrics_know(
    needs, bench, asked, monkeypatch
):
    counted = Pass(
        "length", version=1, order=9, record=Lengths, model=needs,
        run=lambda model, inputs, **limits: [
            [len(row.input_ids) for row in data.answers] for data in inputs
        ],
        pack=lambda lengths, data: {"value": np.array(lengths)},
        unpack=lambda arrays, data: Lengths(arrays["value"].tolist()),
    )  # fmt: skip
    for registry in (PASSES, HANDLERS):
        monkeypatch.setattr(registry, "_entries", {name: registry[name] for name in registry})
    register(counted)

    @metric("mean_length", higher_is_better=None)
    def mean_length(lengths: Lengths) -> Value:
        return Value(float(np.mean(lengths)))

    metrics = {"length": {"handler": "mean_length", "inputs": {"lengths": "forget"}}}
    [planned] = bench.suite(metrics=metrics, panel=[]).plan(bench.subject())
    assert (planned["pass"], planned["rows"], planned["kept"]) == ("length", 5, False)
    found = bench.suite(metrics=metrics, panel=[]).evaluate(bench.subject())
    assert asked == [("length", "forget")] and found["length"] > 1
    assert planned["tokens"] == (5 if needs == "none" else 5 * found["length"])
    again = bench.suite(metrics=metrics, panel=[])
    assert again.evaluate(LazyModel(refuse, "model", "root")) == found


@pytest.mark.parametrize("reads", ["answers", "prompts"])
def test_how_many_examples_were_cut_is_added_where_a_pass_does_not_say_it(reads, bench):
    suite = bench.suite()
    source, rows = suite.sources["forget"], range(5)
    source.config["max_length"] = int(source.answers.tokens.max()) - 1
    source.__dict__.pop("answers")  # made into tokens again
    num_cut = source.num_cut(rows, prompts=reads == "prompts")
    data = PassInput(source, rows, suite.settings)
    silent = replace(PASSES["legible"], reads=reads, pack=lambda p, data: {"value": np.zeros(5)})
    assert _packed(silent, None, data)["cut"] == num_cut
    assert (num_cut > 0) == (reads == "answers")  # a prompt alone is short enough
    told = replace(silent, pack=lambda p, data: {"cut": np.array(7)})
    assert _packed(told, None, data)["cut"] == 7


def test_a_damaged_answer_is_asked_again_alone(bench, asked, tmp_path, caplog):
    suite = bench.suite()
    runner = suite._runner(bench.subject(), suite._chosen(None))
    file = runner.cache._file(runner.key("score", "holdout"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    suite.evaluate(bench.subject(), tmp_path / "log")
    assert asked == [("score", "holdout")] and "is damaged" in caplog.text
    # it was in other company this time, which changes the last digits
    new, old = (
        json.loads((folder / "log" / "TOFU_SUMMARY.json").read_text())
        for folder in (tmp_path, bench.folder)
    )
    assert new.pop("not_computed") == old.pop("not_computed")
    assert new == pytest.approx(old, rel=1e-5)
    asked.clear()
    bench.suite().evaluate(LazyModel(refuse, "model", "root"))
    assert asked == []


def test_a_panel_asks_about_rows_of_its_own_and_keeps_them(bench, asked):
    suite = bench.suite(panel_rows=2)
    first = suite.evaluate(bench.subject(), panel=True)
    assert asked == [("score", "forget")]
    assert suite.evaluate(LazyModel(refuse, "model", "root"), panel=True) == first
    whole = bench.suite(panel_rows=5).evaluate(LazyModel(refuse, "model", "root"), panel=True)
    assert len(asked) == 1 and whole != first


def test_a_cache_that_cannot_be_written_costs_no_result(
    bench, asked, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UNLORA_CACHE", str(tmp_path / "file"))
    bench.suite().evaluate(bench.subject(), tmp_path / "log")
    assert set(asked) == ALL and "Answers are not kept" in caplog.text
    log = (tmp_path / "log" / "TOFU_EVAL.json").read_bytes()
    assert log == (bench.folder / "log" / "TOFU_EVAL.json").read_bytes()


def test_rows_without_any_answer_are_counted_and_not_fatal(bench, tmp_path):
    """A list of answers may be empty, and in a panel those of all rows may be."""
    change = other_data(bench, tmp_path, lambda rows: [r["perturbed_answer"].clear() for r in rows])
    suite = bench.suite(**change)
    suite.evaluate(bench.subject(), tmp_path / "log")
    entry = json.loads((tmp_path / "log" / "TOFU_EVAL.json").read_text())["forget_Q_A_PERT_Prob"]
    assert entry["agg_value"] is None and entry["unscored"] == 5
    suite.evaluate(LazyModel(refuse, "model", "root"))


def test_a_dead_models_answers_are_kept_as_they_are(bench, asked, tmp_path):
    model = copy.deepcopy(bench.model)
    model.get_output_embeddings().weight.data.fill_(float("nan"))
    subject = LazyModel(lambda: model, "dead", "dead root")
    bench.suite().evaluate(subject, tmp_path / "one")
    asked.clear()
    bench.suite().evaluate(LazyModel(refuse, "dead", "dead root"), tmp_path / "two")
    assert asked == []
    one, two = ((tmp_path / name / "TOFU_EVAL.json").read_bytes() for name in ("one", "two"))
    assert one == two and b'"unscored": 5' in one


def test_the_root_is_asked_with_its_adapters_off_and_they_are_on_again(bench):
    model = bench.model
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    with model.disable_adapter():
        expected = model(ids).logits
    with bench.subject().as_root() as root:
        assert torch.equal(root(ids).logits, expected)
    assert torch.equal(model(ids).logits, before) and not torch.equal(before, expected)
