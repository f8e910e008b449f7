"""A classifier of texts: its batches, the memory they take, and where it comes from."""

import logging
import shutil

import huggingface_hub.constants
import huggingface_hub.file_download
import numpy as np
import pytest
import small_tofu
import torch
import transformers
from transformers import BertForSequenceClassification

from unlora.errors import InputError
from unlora.evals.passes import batching, fluency_prob, identity_of

TEXTS = ["The river.", None, "x" * 90, "", "Bread is old, and so is this.", "  ", "A river"]
WRITTEN = [0, 2, 4, 6]
COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture
def classifier(tokenizer, tmp_path):
    torch.manual_seed(0)
    return small_tofu.save_classifier(tmp_path / "classifier", tokenizer)


def with_memory_for(monkeypatch, rows):
    """Classifiers run out of memory on more rows at a time; the shapes of batches are listed."""
    shapes, original = [], BertForSequenceClassification.forward

    def forward(self, input_ids=None, **kwargs):
        shapes.append(tuple(input_ids.shape))
        if len(input_ids) > rows:
            raise torch.OutOfMemoryError("simulated")
        return original(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(BertForSequenceClassification, "forward", forward)
    return shapes


def test_batches_change_no_probability_and_keep_within_their_budget(classifier, monkeypatch):
    expected = fluency_prob(classifier, TEXTS, batch_size=1)
    assert [i for i, p in enumerate(expected) if not np.isnan(p)] == WRITTEN
    assert len({round(expected[i], 6) for i in WRITTEN}) == len(WRITTEN)
    shapes = with_memory_for(monkeypatch, 100)
    done = []
    for cut in ({}, {"batch_size": 2}, {"tokens": 60}):
        found = fluency_prob(classifier, TEXTS, progress=done.append, **cut)
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6)
    assert shapes[0] == (4, 90) and shapes[1][0] == shapes[2][0] == 2
    # the longest alone, the three others (of 29 tokens at most) as far as 60 tokens go
    assert [rows for rows, _ in shapes[3:]] == [1, 2, 1]
    assert sum(done) == 3 * len(TEXTS)


def test_where_memory_runs_out_batches_are_halved_and_no_text_is_lost(
    classifier, monkeypatch, caplog
):
    expected = fluency_prob(classifier, TEXTS)
    shapes = with_memory_for(monkeypatch, 1)
    with caplog.at_level(logging.WARNING):
        found = fluency_prob(classifier, TEXTS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6)
    assert [rows for rows, _ in shapes] == [4, 2, 1, 1, 1, 1]
    assert "Memory ran out on 4 rows" in caplog.text
    with_memory_for(monkeypatch, 0)
    with pytest.raises(InputError, match="a single row of 90 tokens"):
        fluency_prob(classifier, TEXTS)


def test_processes_share_the_texts_out(classifier, monkeypatch):
    expected = fluency_prob(classifier, TEXTS, batch_size=1)
    shapes = with_memory_for(monkeypatch, 100)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(batching, "rank_and_size", lambda rank=rank: (rank, 2))
        monkeypatch.setattr(
            batching, "gathered",
            lambda found: shares.append(found) or {k: 0.0 for k in range(4)} | found,
        )  # fmt: skip
        fluency_prob(classifier, TEXTS, batch_size=1)
    assert len(shapes) == 4 and [len(share) for share in shares] == [2, 2]
    together = shares[0] | shares[1]
    assert [together[k] for k in range(4)] == [expected[i] for i in WRITTEN]


def test_nothing_written_is_nothing_asked(classifier, monkeypatch):
    shapes = with_memory_for(monkeypatch, 0)
    assert np.isnan(fluency_prob(classifier, [None, " "])).all() and shapes == []
    assert list(fluency_prob(classifier, [])) == []


@pytest.fixture
def hub(classifier, tmp_path, monkeypatch):
    """A local cache of the hub with two commits of one classifier."""
    repository = tmp_path / "hub" / "models--someone--clean"
    for commit in COMMITS:
        shutil.copytree(classifier, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMITS[0])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    # older packages have copies of it
    for place in (huggingface_hub.file_download, transformers.utils.hub):
        for name in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE"):
            if hasattr(place, name):
                monkeypatch.setattr(place, name, str(tmp_path / "hub"))
    return repository


def test_a_classifier_of_the_hub_is_told_by_its_commit(hub, classifier):
    first = identity_of("someone/clean")
    assert first == f"someone/clean@{COMMITS[0]}"
    (hub / "refs" / "main").write_text(COMMITS[1])
    assert identity_of("someone/clean") == f"someone/clean@{COMMITS[1]}"
    assert identity_of("someone/else") is None  # nobody knows what it would say
    assert len(identity_of(classifier)) == 64
