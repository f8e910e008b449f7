"""Folders that cannot be written, and repositories that cannot be read: one sentence each."""

import errno
import os
import tempfile
from types import SimpleNamespace

import pytest
from bad_files import (
    EVAL,
    UNLEARN,
    contents,
    make_models,
    refuse_weights,
    refused,
    write_good_files,
)
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from unlora.runs import atomic_files
from unlora.runs.run import Run


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    write_good_files(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


# --- folders -------------------------------------------------------------------------------------


def fails(number):
    """A call that fails as the system does."""

    def call(*_, **__):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("command", [UNLEARN, EVAL], ids=["unlearn", "eval"])
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_refused_before_weights_are_read(
    models, capsys, monkeypatch, command, number
):
    refuse_weights(monkeypatch)
    monkeypatch.setattr(tempfile, "TemporaryFile", fails(number))
    words = [*command, f"model={models / 'root'}"]
    expected = rf"mine' cannot be made or written: {os.strerror(number)}. Set paths.output_dir"
    refused(words, expected, capsys, monkeypatch)


@pytest.mark.slow
def test_a_file_where_the_run_folder_would_be_is_kept(here, models, capsys, monkeypatch):
    (here / "notes").write_text("mine")
    refuse_weights(monkeypatch)
    words = [*UNLEARN, f"model={models / 'root'}", "paths.output_dir=notes"]
    refused(words, "'notes' cannot be made or written: File exists", capsys, monkeypatch)


@pytest.mark.slow
def test_an_evaluation_that_finds_the_disk_full_keeps_the_earlier_log(models, capsys, monkeypatch):
    monkeypatch.setattr(atomic_files, "_sync", fails(errno.ENOSPC))
    words = [*EVAL, f"model={models / 'root'}", "eval.own.max_new_tokens=1"]
    refused(words, "The disk is full: .* Free some space", capsys, monkeypatch)


@pytest.mark.slow
def test_a_log_that_is_not_to_be_replaced_is_kept(models, capsys, monkeypatch):
    refuse_weights(monkeypatch)
    words = [*EVAL, f"model={models / 'root'}", "eval.own.overwrite=false"]
    refused(words, "OWN_EVAL.json is there already. Set", capsys, monkeypatch)


def test_an_export_into_a_folder_that_is_not_empty_is_refused(here, models, capsys, monkeypatch):
    words = ["export", str(models / "run"), "--merged", "--output", "saves"]
    refused(words, "'saves' is not empty. Give another --output", capsys, monkeypatch)


@pytest.mark.slow
def test_a_run_into_the_folder_of_its_own_model_is_refused(models, capsys, monkeypatch):
    refuse_weights(monkeypatch)
    before = contents(models)
    folder = models / "run"
    words = [*UNLEARN, f"model={folder}", f"paths.output_dir={folder}"]
    refused(words, "which holds the model it starts from. Set another", capsys, monkeypatch)
    assert contents(models) == before


def test_an_earlier_run_is_kept_and_its_place_is_said(here, caplog):
    before = contents(here / "saves/unlearn/mine")
    Run("saves/unlearn/mine", {}).begin(fresh=True)
    assert contents(here / "saves/unlearn/mine.previous-1") == before
    said = "saves/unlearn/mine held an earlier run; it was kept as saves/unlearn/mine.previous-1"
    assert said in caplog.text


# --- the hub -------------------------------------------------------------------------------------

ANSWER = SimpleNamespace(headers={}, status_code=403, request=None)
REPOSITORY = {
    "gated": (GatedRepoError("You must log in", response=ANSWER),
              "'someone/model' is gated: accept its licence on the hub and log in with"),
    "unknown or private": (RepositoryNotFoundError("404", response=ANSWER),
                           "There is no model 'someone/model', neither as a folder nor on the hub"),
    "of no such revision": (RevisionNotFoundError("404", response=ANSWER),
                            "no such revision. Give a branch, tag or commit"),
    "out of reach": (LocalEntryNotFoundError("offline"), "hub cannot be reached. Give a folder"),
    "without a network": (ConnectionError("no route"), "the hub cannot be reached. Give a"),
    "without an answer": (TimeoutError("too slow"), "the hub cannot be reached. Give a"),
}  # fmt: skip


@pytest.mark.default_cases(3)
@pytest.mark.parametrize("error, expected", REPOSITORY.values(), ids=REPOSITORY)
def test_a_model_that_cannot_be_fetched_is_one_sentence(capsys, monkeypatch, error, expected):
    def fetch(*_, **__):
        raise error

    refuse_weights(monkeypatch)
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", fetch)
    refused([*UNLEARN, "model=someone/model"], expected, capsys, monkeypatch)


DATA = {
    "gated": (DatasetNotFoundError("Dataset 'x' is a gated dataset on the Hub."), "is gated:"),
    "unknown": (DatasetNotFoundError("Dataset 'x' doesn't exist on the Hub"), "Check its path"),
    "of no such split": (ValueError('Unknown split "trian". Should be one of [].'), "and split in"),
    "a script": (RuntimeError("Dataset scripts are no longer supported"), "no longer supported"),
    "out of reach": (ConnectionError("Couldn't reach 'x' on the Hub"), "datasets_dir=FOLDER"),
}  # fmt: skip


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("error, expected", DATA.values(), ids=DATA)
def test_data_that_cannot_be_fetched_are_one_sentence(models, capsys, monkeypatch, error, expected):
    def fetch(*_, **__):
        raise error

    refuse_weights(monkeypatch)
    monkeypatch.setattr("datasets.load_dataset", fetch)
    words = ["unlearn", "experiment=unlearn/tofu/lora", f"model={models / 'root'}", "trainer=NPO"]
    refused(words, expected, capsys, monkeypatch)


def test_a_tokenizer_that_is_gated_is_one_sentence(models, capsys, monkeypatch):
    refuse_weights(monkeypatch)
    named = "model.tokenizer_args.pretrained_model_name_or_path=someone/model"
    words = [*EVAL, f"model={models / 'root'}", named]
    expected = "No tokenizer could be loaded from 'someone/model': .* Set model.tokenizer_args"
    refused(words, expected, capsys, monkeypatch)
