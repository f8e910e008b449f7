"""RWKU on a few rows in its shape: people to forget, their neighbours, and text about both."""

import json

import numpy as np
import pytest
from omegaconf import OmegaConf
from tiny import llama

from unlora.cli.compose import composed
from unlora.errors import InputError
from unlora.evals import build_suites

PEOPLE = ("Ada Holm", "Ivo Brandt", "Mara Quist")
LEVELS = {
    "forget_level1": "___ kept bees.",
    "forget_level2": "What did {} keep?",
    "forget_level3": "You are a beekeeper. What did {} keep?",
    "neighbor_level1": "The sister of {} kept ___.",
    "neighbor_level2": "What did the sister of {} keep?",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with the columns of the data on the hub."""
    folder = tmp_path_factory.mktemp("rwku")
    for name, query in LEVELS.items():
        rows = [
            {"query": query.format(person), "answer": f"{kept} of {person}", "level": name[-1],
             "type": "cloze", "subject": person}
            for person in PEOPLE
            for kept in ("bees", "geese")
        ]  # fmt: skip
        write(folder / name, rows)
    for name, about in (("mia_forget", "{} kept bees"), ("mia_retain", "The town of {} is old")):
        texts = [about.format(person) + f" in the year {n}." for person in PEOPLE for n in range(3)]
        people = [person for person in PEOPLE for _ in range(3)]
        write(folder / name, [{"text": t, "ngram": 0.1, "subject": p}
                              for t, p in zip(texts, people, strict=True)])  # fmt: skip
    return folder


def write(folder, rows):
    folder.mkdir()
    (folder / "test.json").write_text(json.dumps(rows))


def build(data, tokenizer, *overrides):
    cfg = composed(
        "eval",
        ["experiment=eval/rwku/lora", f"eval.rwku.path={data}", "eval.rwku.max_new_tokens=4",
         "eval.rwku.cache=false", *overrides],
    )  # fmt: skip
    config = OmegaConf.to_container(cfg.eval.rwku, resolve=True)
    tags = {"user_start_tag": "Q: ", "user_end_tag": "A: "}
    (suite,) = build_suites({"rwku": config}, tokenizer=tokenizer, template_args=tags)
    return suite


def test_every_figure_has_a_value_and_stands_in_the_log(data, tokenizer, tmp_path):
    suite = build(data, tokenizer)
    summary = suite.evaluate(llama(max_position_embeddings=512), tmp_path)
    levels = {f"{name}_ROUGE" for name in LEVELS}
    attacks = {"mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus"}
    assert set(summary) == levels | attacks | {"neighbor_repetition", "collapsed"}
    assert all(np.isfinite(summary[name]) for name in levels | attacks)
    better = suite.metrics
    assert not better["forget_level1_ROUGE"] and better["neighbor_level1_ROUGE"]
    log = json.loads((tmp_path / "RWKU_EVAL.json").read_text())
    assert len(log["forget_level3_ROUGE"]["value_by_index"]) == 6
    # the mean loss of text about the subjects and about others, which the paper prints
    sides = [log["mia_loss"][side]["agg_value"] for side in ("forget", "holdout")]
    assert all(np.isfinite(side) for side in sides) and sides[0] != sides[1]


def test_a_gap_and_a_question_are_put_in_the_words_of_the_benchmark(data, tokenizer):
    sources = build(data, tokenizer).sources
    words = {"1": "Q: Please complete the blank in the following question.\nQuestion: ",
             "2": "Q: Please briefly answer the following question.\nQuestion: "}  # fmt: skip
    for name in LEVELS:
        wanted = words["1" if name.endswith("1") else "2"]
        assert all(prompt.startswith(wanted) for prompt in sources[name].prompt_texts)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    "subject, kept",
    [("Ivo Brandt", {"Ivo Brandt"}), ("[Ada Holm,Mara Quist]", {"Ada Holm", "Mara Quist"})],
)
def test_only_the_subjects_that_were_forgotten_are_asked_about(data, tokenizer, subject, kept):
    suite = build(data, tokenizer, f"eval.rwku.subject={subject}")
    for source in suite.sources.values():
        assert {row["subject"] for row in source.rows} == kept


def test_an_unknown_subject_is_named_with_the_nearest(data, tokenizer):
    with pytest.raises(InputError, match="no row has 'Ada Hulm' .* Did you mean 'Ada Holm'"):
        build(data, tokenizer, "eval.rwku.subject=Ada Hulm")
