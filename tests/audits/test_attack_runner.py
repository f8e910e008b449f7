"""Every kind of attack against plain transformers and peft, and answers that are kept."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from audited_runs import PARTS, TEMPLATE, encoded, write_runs
from audits.test_patching import patched_literally, places
from peft import PeftModel
from tiny import tokenizer
from transformers import AutoModelForCausalLM

from unlora.audits.attack import ATTACKS, Questions, ShortTraining
from unlora.audits.attack_runner import AttackRunner
from unlora.audits.attacks.quantise import rounded_by_channel
from unlora.audits.relearning import Relearning
from unlora.audits.subject import AuditedModel
from unlora.cli.compose import composed
from unlora.config.audit_config import read_audit
from unlora.data.chat_encoding import Chat
from unlora.errors import InputError
from unlora.evals.passes.declaration import Settings
from unlora.evals.result_cache import ResultCache
from unlora.model.adapter_scale import write_scaled
from unlora.recipes.audited_run import find_run

FORGET = encoded("forget")
ASKED = {
    "plain": {},
    "wordings": {"prefixes": ("Now: {}",), "examples": 1},
    "quantise": {"form": "int8"},
    "scale": {"scale": 0.5},
    "sample": {"samples": 2, "k": (1,), "temperature": 1e-3},
    "relearn": {"steps": (1, 2), "learning_rates": (1e-3,), "least": 4, "batch_size": 3},
    "depth": {},
}
CLOSE = {"abs": 1e-5, "nan_ok": True}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return write_runs(tmp_path_factory.mktemp("audited") / "saves")


def found(folder, *words):
    cfg = composed("audit", words)
    cfg.run = str(folder)
    return find_run(read_audit(cfg))


@pytest.fixture
def run(runs):
    return found(runs / "npo")


@pytest.fixture
def runner(run, tmp_path):
    return AttackRunner(run.data, run.target, ResultCache(tmp_path / "answers"), Settings())


def scores(runner, name, model, **changes):
    attack = ATTACKS[name]
    settings = attack.configured(ASKED[name] | changes)
    return dict(runner.scores(attack, settings, model))


def network(runs, *adapters, scale=1.0):
    """Plain weights: the root with adapters merged one after the other, the last of them scaled."""
    model = AutoModelForCausalLM.from_pretrained(runs / "root")
    for name in adapters:
        model = PeftModel.from_pretrained(model, str(runs / name))
        if name == adapters[-1]:
            for key, weight in model.named_parameters():
                weight.data *= scale if "lora_B" in key else 1
        model = model.merge_and_unload()
        vars(model).pop("peft_config", None)  # an older peft leaves it, and warns of it later
    return model.eval()


@torch.no_grad()
def logps(model, rows=FORGET):
    """Mean log-probability of each answer, one row after the other."""
    means = []
    for row in rows:
        every = model(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        means.append(float(np.mean([every[t, row.input_ids[t + 1]] for t in places(row)])))
    return means


def test_asked_plainly_each_model_is_its_weights(runs, run, runner):
    for model, adapters in zip(
        run.models, (("target", "npo"), ("target",), ("gold",)), strict=True
    ):
        expected = logps(network(runs, *adapters))
        assert scores(runner, "plain", model)[""] == pytest.approx(expected, **CLOSE), model.role
    known, never = (np.mean(logps(network(runs, name))) for name in ("target", "gold"))
    assert known > never + 1  # or there would be nothing to forget


def test_of_other_questions_the_most_revealing_counts(runs, run, runner):
    chat, model = Chat(tokenizer(), TEMPLATE), network(runs, "target", "npo")
    shown = [(row["question"], row["answer"]) for row in PARTS["retain"][:1]]
    ways = {
        "paraphrase": [(row["paraphrased_question"], row["answer"]) for row in PARTS["forget"]],
        "prefix": [(f"Now: {row['question']}", row["answer"]) for row in PARTS["forget"]],
    }
    rows = {name: chat.encode_all(pairs) for name, pairs in ways.items()}
    pairs = [(row["question"], row["answer"]) for row in PARTS["forget"]]
    rows["examples"] = chat.encode_all(pairs, examples=shown)
    expected = np.max([logps(model, asked) for asked in rows.values()], axis=0)
    assert scores(runner, "wordings", run.unlearned)[""] == pytest.approx(expected, **CLOSE)
    assert len({tuple(row.input_ids) for asked in rows.values() for row in asked}) == 3 * 24


def asked_of(runs, changes):
    """The forget rows asked in other words, where the run's data sets are declared otherwise."""
    words = [f"data.{part}.{key}={value}" for (part, key), value in changes.items()]
    return found(runs / "npo", *words).data.asked({"num_examples": 1})


def test_an_example_is_a_retain_row_though_all_rows_are_in_one_file(runs, tmp_path):
    file = tmp_path / "all.jsonl"
    rows = [row | {"part": part} for part in ("forget", "retain") for row in PARTS[part]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {(part, "hf_args.path"): file for part in ("forget", "retain")}
    changes |= {(part, "where.part"): part for part in ("forget", "retain")}
    asked = asked_of(runs, changes)
    assert len(asked) == 24
    assert [row["question"] for row in asked.shown] == [PARTS["retain"][0]["question"]]


def test_an_example_is_a_retain_row_with_an_answer_in_columns_of_its_own(runs, tmp_path):
    first, second, *_ = PARTS["retain"]
    rows = [first | {"answer": " "}, second]
    file = tmp_path / "retain.jsonl"
    file.write_text(
        "".join(json.dumps({"q": row["question"], "a": row["answer"]}) + "\n" for row in rows)
    )
    keys = {"hf_args.path": file, "question_key": "q", "answer_key": "a"}
    asked = asked_of(runs, {("retain", key): value for key, value in keys.items()})
    assert asked.shown == [{key: second[key] for key in ("question", "answer")}]


def test_other_words_go_around_those_of_the_data_and_not_around_nothing(runs, tmp_path):
    rows = [row | {"paraphrased_question": None} for row in PARTS["forget"][:1]]
    file = tmp_path / "forget.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows + PARTS["forget"][1:]))
    data = found(runs / "npo", f"data.forget.hf_args.path={file}").data
    asked = data.asked({"question_key": "paraphrased_question"})
    assert not asked.answers[0][0].input_ids and asked.answers[1][0].input_ids
    told = Questions(tuple(rows[0]), {"handler": "QADataset", "question_format": "Q: {}"}, 8)
    ways = ATTACKS["wordings"].fn(told, prefixes=("Now: {}",))
    assert ways["prefix 1"] == {"question_format": "Now: Q: {}"}
    with pytest.raises(InputError, match="'Say it.'; it must have {} where the question"):
        ATTACKS["wordings"].configured({"prefixes": ("Say it.",)})


def test_merged_weights_are_changed(runs, run, runner):
    model = network(runs, "target", "npo")
    for name, weight in model.named_parameters():
        if name.endswith("_proj.weight"):
            weight.data = rounded_by_channel(weight.data, 8)
    found = scores(runner, "quantise", run.unlearned)[""]
    assert found == pytest.approx(logps(model), **CLOSE)
    assert found != pytest.approx(scores(runner, "plain", run.unlearned)[""], abs=1e-3)


def test_the_last_adapter_is_turned_and_so_is_that_of_a_scaled_model(runs, run, runner):
    half = logps(network(runs, "target", "npo", scale=0.5))
    assert scores(runner, "scale", run.unlearned)[""] == pytest.approx(half, **CLOSE)
    at_half = run.unlearned.at(0.5)
    assert scores(runner, "plain", at_half)[""] == pytest.approx(half, **CLOSE)
    merged = logps(network(runs, "target", "npo", scale=0.8))
    off = scores(runner, "quantise", run.unlearned.at(0.8))[""]
    assert off == pytest.approx(merged, abs=0.1) and off != pytest.approx(half, abs=0.1)


def test_a_copy_of_a_row_that_was_trained_on_is_not_scored(runs, run, runner, tmp_path):
    plan = ShortTraining("forget", (0, 2), 1e-3, (1,))
    file = tmp_path / "twice.jsonl"
    rows = [*PARTS["forget"][:4], PARTS["forget"][2]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    runner.data = found(runs / "npo", f"data.forget.hf_args.path={file}").data
    attack = replace(ATTACKS["relearn"], fn=lambda data: [plan])
    ((_, scored),) = runner.scores(attack, {}, run.unlearned)
    assert np.isnan(scored).tolist() == [True, False, True, False, True]


def test_a_form_that_only_one_model_has_says_nothing(run, runner):
    given = iter("abc")
    attack = replace(
        ATTACKS["plain"], fn=lambda answers: {next(given): np.arange(len(answers), dtype=float)}
    )
    (one,) = runner.compare("mine", attack, {}, run.models, counts=True)
    assert np.isnan(one.target).all() and np.isnan(one.retain).all() and not one.scored.any()


def test_attacks_on_the_adapter_ask_target_and_retain_model_plainly(run, runner):
    attack = ATTACKS["scale"]
    (one,) = runner.compare("half", attack, {"scale": 0.5}, run.models, counts=False)
    assert one.target == pytest.approx(scores(runner, "plain", run.target)[""], **CLOSE)
    assert one.retain == pytest.approx(scores(runner, "plain", run.retain)[""], **CLOSE)
    assert (one.name, one.attack, one.counts) == ("half", "half", False)


@torch.no_grad()
def greedy(model, prompt, length):
    ids = list(prompt)
    for _ in range(length):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_drawn_texts_are_what_the_model_goes_on_with(runs, run, runner):
    model, raw = network(runs, "target"), tokenizer()
    leaks = []
    for row, one in zip(PARTS["forget"], FORGET, strict=True):
        start = one.labels.index(next(label for label in one.labels if label != -100))
        text = raw.decode(greedy(model, one.input_ids[:start], 4), skip_special_tokens=True)
        leaks.append(float(row["answer"].split()[0] in text))  # one of two words
    found = scores(runner, "sample", run.target)
    assert list(found) == ["rouge@1", "span@1"]
    assert found["rouge@1"].tolist() == leaks and np.mean(leaks) > 0


def test_rows_that_an_attacker_trained_on_are_not_scored(runs, run, runner):
    found = scores(runner, "relearn", run.unlearned)
    drawn = sorted(np.random.default_rng(0).choice(24, 4, replace=False).tolist())
    plan = ShortTraining("forget", tuple(drawn), 1e-3, (1, 2), batch_size=3)
    training = Relearning(
        network(runs, "target", "npo"), [FORGET[n] for n in drawn], plan, tokenizer().pad_token_id
    )
    assert list(found) == [f"learning rate 0.001, step {step}" for step in (1, 2)]
    for step, of_form in zip((1, 2), found.values(), strict=True):
        expected = np.array(logps(training.at(step)))
        expected[drawn] = np.nan
        assert of_form == pytest.approx(expected, **CLOSE)


def test_the_target_reads_inner_states(runs, run, runner, monkeypatch):
    monkeypatch.setattr("unlora.audits.attack_runner.ROWS_AT_ONCE", 10)  # three parts
    own, target = network(runs, "target", "npo"), network(runs, "target")
    found = scores(runner, "depth", run.unlearned)[""]
    assert np.isfinite(found).all()
    for n in (0, 11, 23):
        row = FORGET[n]
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            first, last = own(ids, output_hidden_states=True).hidden_states[1:]
            behind = target.lm_head(last)[0].log_softmax(-1)  # the norm before it has no adapter
        expected = [
            patched_literally(target, row, first[0, places(row)], 0),
            float(np.mean([behind[t, row.input_ids[t + 1]] for t in places(row)])),
        ]
        assert found[n] == pytest.approx(np.mean(expected), **CLOSE)


# --- kept ----------------------------------------------------------------------------------------


@pytest.fixture
def loaded(monkeypatch):
    """The roles of the models that were loaded, in turn."""
    roles, load = [], AuditedModel.load
    monkeypatch.setattr(AuditedModel, "load", lambda self: roles.append(self.role) or load(self))
    return roles


@pytest.mark.default_cases(3)
@pytest.mark.parametrize("name", ASKED)
def test_what_was_asked_is_not_asked_again_and_a_changed_setting_is(name, run, runner, loaded):
    before = scores(runner, name, run.unlearned)
    assert loaded
    loaded.clear()
    again = AttackRunner(run.data, run.target, runner.cache, Settings(batch_size=2))
    found = scores(again, name, run.unlearned)
    assert not loaded and list(found) == list(before)
    assert all(np.array_equal(found[form], before[form], equal_nan=True) for form in before)
    changes = {
        "wordings": {"prefixes": ("Then: {}",)}, "quantise": {"form": "nf4"},
        "scale": {"scale": 0.6}, "sample": {"seed": 1}, "relearn": {"seed": 1},
    }  # fmt: skip
    if name in changes:
        scores(again, name, run.unlearned, **changes[name])
        assert loaded == ["unlearned"]


@pytest.mark.slow
def test_a_longer_training_asks_only_for_what_is_new(run, runner, loaded):
    two = scores(runner, "relearn", run.unlearned)
    loaded.clear()
    three = scores(runner, "relearn", run.unlearned, steps=(1, 2, 3))
    assert loaded == ["unlearned"] and len(three) == 3
    form = "learning rate 0.001, step 2"
    assert np.array_equal(three[form], two[form], equal_nan=True)


def test_the_scale_is_part_of_what_answers_are_kept_under(run):
    keys = [run.unlearned.at(scale).key for scale in (0.0, 0.5, 0.51, 1.0)]
    assert len({*keys, run.target.key, run.retain.key}) == 6
    assert keys[-1] == run.unlearned.key


@pytest.mark.slow
def test_two_runs_share_the_answers_of_target_and_retain_model(runs, run, runner, loaded):
    other = write_scaled(runs / "npo", 0.9, runs / "simnpo")
    for name in ("plain", "quantise", "depth"):
        [scores(runner, name, model) for model in run.models]
    loaded.clear()
    second = found(other)
    again = AttackRunner(second.data, second.target, copy.copy(runner.cache), Settings())
    for name in ("plain", "quantise", "depth"):
        [scores(again, name, model) for model in second.models]
    # inner states of the unlearned model are read by the target, on the same weights
    assert loaded == ["unlearned"] * 3
