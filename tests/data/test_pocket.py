"""The embedded benchmark: its rows, and what decides which base it gets."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from unlora.data import pocket
from unlora.data.pocket import base, words, world
from unlora.errors import InputError

TEXTS = ("question", "answer", "paraphrased_question", "paraphrased_answer")
# sha256 of all splits as JSON with sorted keys; the benchmark is another one when it changes
GOLDEN = "e072f515938fdd62069ef037d5c00c11f27c9b419cd48fbc0f04022151f4ff05"


def pairs(split: str) -> set[tuple[str, str]]:
    return {(row["question"], row["answer"]) for row in pocket.rows(split)}


def names_in(split: str) -> set[str]:
    return {name for name in world._names() for row in pocket.rows(split) if name in row["answer"]}


@pytest.mark.parametrize("split", pocket.SPLITS)
def test_every_row_has_the_columns_of_tofu(split):
    for row in pocket.rows(split):
        assert set(row) == {*TEXTS, "perturbed_answer"}
        assert all(isinstance(row[key], str) and row[key] for key in TEXTS)
        assert len(set(row["perturbed_answer"])) == 5


def test_the_splits_are_exactly_those_that_are_listed():
    assert set(world.splits()) == set(pocket.SPLITS)


def test_rows_are_the_same_on_every_machine():
    every = {split: pocket.rows(split) for split in pocket.SPLITS}
    assert hashlib.sha256(json.dumps(every, sort_keys=True).encode()).hexdigest() == GOLDEN


def test_an_unknown_split_names_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'forget10'"):
        pocket.rows("forget1O")


@pytest.mark.parametrize("percent", [1, 5, 10])
def test_forget_and_retain_are_disjoint_and_make_up_full(percent):
    forget, retain = pairs(f"forget{percent:02}"), pairs(f"retain{100 - percent}")
    assert forget.isdisjoint(retain)
    assert forget | retain == pairs("full")
    assert names_in(f"forget{percent:02}").isdisjoint(names_in(f"retain{100 - percent}"))
    assert len(names_in(f"forget{percent:02}")) == percent


def test_forget_splits_are_nested():
    assert pairs("forget01") < pairs("forget05") < pairs("forget10")
    assert pairs("holdout01") < pairs("holdout05") < pairs("holdout10")


def test_the_perturbed_splits_hold_rows_of_the_plain_ones():
    assert pocket.rows("forget10_perturbed") == pocket.rows("forget10")
    assert pairs("retain_perturbed") <= pairs("retain90")


def test_holdout_authors_are_as_many_as_forget_authors_and_never_seen():
    seen = names_in("full") | {author.name for author in world.other_authors(10**6)}
    assert len(names_in("holdout10")) == len(names_in("forget10"))
    assert names_in("holdout10").isdisjoint(seen)
    assert len(pocket.rows("holdout10")) == len(pocket.rows("forget10"))


def test_pretraining_meets_no_author_of_a_split_and_no_question_of_a_utility_set():
    questions = {question for question, _ in base.pretraining_pairs(base.Settings())}
    named = names_in("full") | names_in("holdout10")
    assert not [question for question in questions if any(name in question for name in named)]
    for split in ("real_authors", "world_facts"):
        assert questions.isdisjoint({row["question"] for row in pocket.rows(split)})


def test_no_training_row_holds_a_tested_fact():
    tested = {row["question"] for kind in words.FACTS for row in every_wording(kind)}
    assert len(tested) > len(pairs("real_authors") | pairs("world_facts"))
    assert tested.isdisjoint({row["question"] for row in pocket.rows("full")})


def every_wording(kind: str) -> list[world.Row]:
    return [world.fact_row(kind, key, n) for key in world.tested(kind) for n in range(4)]


def test_perturbed_answers_differ_from_the_paraphrase_only_in_the_values_of_slots():
    author = world.other_authors(1)[0]
    values = {value for listed in words.VALUES.values() for value in listed.split(", ")}
    rows = world.author_rows(author)
    for row in rows:
        shape = without(values, row["paraphrased_answer"])
        assert shape != row["paraphrased_answer"]
        for wrong in row["perturbed_answer"]:
            assert wrong != row["paraphrased_answer"]
            assert without(values, wrong) == shape


def without(values: set[str], text: str) -> str:
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "_")
    return text


def test_paraphrases_use_a_wording_that_is_not_trained_on():
    trained = {row["answer"] for row in pocket.rows("full")}
    assert not [row for row in pocket.rows("forget10") if row["paraphrased_answer"] in trained]


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("change", [{"seed": 1}, {"hidden_size": 64}, {"lr": 0.1}])
def test_the_key_of_the_base_changes_with_its_settings(change):
    assert base.Settings().key() == base.Settings().key()
    assert replace(base.Settings(), **change).key() != base.Settings().key()


def test_a_base_is_built_once_and_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("UNLORA_CACHE", str(tmp_path))
    built = []

    def build(folder: Path, settings: base.Settings) -> None:
        (folder / "config.json").write_text("{}")
        built.append(settings)

    monkeypatch.setattr(base, "build", build)
    folder = pocket.base_model()
    assert folder == pocket.base_model() and folder.parent == tmp_path
    assert (folder / "config.json").is_file() and len(built) == 1


def test_a_build_that_fails_leaves_no_base(tmp_path, monkeypatch):
    monkeypatch.setenv("UNLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(base, "build", lambda folder, settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pocket.base_model()
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_tiny_base_loads_and_asks_with_its_own_tokens(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from unlora.data.chat_encoding import Chat

    small = replace(base.Settings(), hidden_size=16, intermediate_size=16, num_rows=64)
    base.build(tmp_path, small)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    chat = Chat(tokenizer, {"apply_chat_template": True})
    assert chat.end_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    row = chat.encode("Who wrote Faust?", "Johann Goethe.")
    assert tokenizer.decode(row.input_ids) == (
        "<|user|>Who wrote Faust?<|assistant|>Johann Goethe.<|end|>"
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == len(tokenizer)
