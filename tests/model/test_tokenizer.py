"""A run brings its own tokenizer; for every other model the one that is named is taken."""

import pytest
from tiny import tokenizer

from unlora.errors import InputError
from unlora.model.tokenizer import get_tokenizer


@pytest.fixture
def model(tmp_path):
    return saved(tmp_path / "model", "<|own|>")


@pytest.fixture
def other(tmp_path):
    return saved(tmp_path / "other", "<|other|>")


def saved(folder, mark):
    """A folder with a tokenizer that can be told from others."""
    made = tokenizer()
    made.pad_token = mark
    made.save_pretrained(str(folder))
    return folder


def mark_of(path, named=None):
    args = {"pretrained_model_name_or_path": str(named)} if named else {}
    return get_tokenizer(str(path), args).pad_token


def test_the_named_tokenizer_is_taken_for_a_model_folder(model, other):
    assert mark_of(model) == "<|own|>"
    assert mark_of(model, other) == "<|other|>"
    with pytest.raises(InputError, match="No tokenizer could be loaded from 'some/tokenizer'"):
        mark_of(model, "some/tokenizer")


@pytest.mark.parametrize("file", ["lineage.json", "manifest.json", "run_config.json"])
def test_a_run_brings_its_own_unless_a_folder_is_named(model, other, file):
    (model / file).write_text("{}")
    assert mark_of(model, "some/tokenizer") == "<|own|>"
    assert mark_of(model, other) == "<|other|>"


def test_a_checkpoint_of_a_run_brings_its_own(model):
    checkpoint = saved(model / "checkpoint-10", "<|checkpoint|>")
    with pytest.raises(InputError, match="some/tokenizer"):
        mark_of(checkpoint, "some/tokenizer")  # not of a run yet
    (model / "run_config.json").write_text("{}")
    assert mark_of(checkpoint, "some/tokenizer") == "<|checkpoint|>"


@pytest.mark.parametrize("run", [False, True])
def test_a_folder_that_is_not_there_is_refused(model, monkeypatch, run):
    monkeypatch.chdir(model.parent)
    if run:
        (model / "manifest.json").write_text("{}")
    for named in ("./nowhere", str(model.parent / "nowhere"), "model/nowhere"):
        with pytest.raises(InputError, match="There is no folder .*nowhere"):
            mark_of(model, named)
