"""What is kept in a temporary file comes back as it was, and takes no memory meanwhile."""

import errno
import gc
import io
import json
import tracemalloc
import warnings

import numpy as np
import pytest
import small_tofu
import tiny

from unlora.data.encoded import Encoded
from unlora.errors import InputError
from unlora.evals import build_suites, runner
from unlora.evals.passes.declaration import concatenated, text_array, texts_of
from unlora.evals.spool import Spool, TokenSpool

N = -100
EXAMPLES = [
    [Encoded([5, 6, 700000, 8], [N, N, 700000, 8], cut=2), Encoded([5, 6, 9], [N, N, 9])],
    [],
    [Encoded([], [])],
    [Encoded([5, 6, 1, 3], [N, 6, 1, N])],
]


def test_rows_come_back_as_they_were():
    rows = TokenSpool(EXAMPLES)
    assert [*rows] == EXAMPLES and rows[1:3] == EXAMPLES[1:3] and rows[-1] == EXAMPLES[-1]
    assert len(rows) == 4 and rows.num_rows == 4
    assert rows.cut.tolist() == [True, False, False, False]
    assert rows.tokens.tolist() == [7, 0, 0, 4]
    assert rows.own.tolist() == [3, 0, 0, 2]  # all begin with 5, 6
    with pytest.raises(IndexError):
        rows[4]


def test_rows_are_not_in_memory():
    made = ([Encoded(list(range(n, n + 400)), [N] * 400)] for n in range(1000, 2000))
    tracemalloc.start()
    rows = TokenSpool(made)
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    # as lists 400 tokens are 8 bytes each, twice, beside the numbers themselves
    assert taken < 100 * len(rows) and rows[7][0].input_ids[:2] == [1007, 1008]


def test_arrays_come_back_as_they_were():
    spool, arrays = Spool(), {"a": np.arange(6.0).reshape(2, 3), "b": np.array(3), "c": np.zeros(0)}
    first, second = spool.add(arrays), spool.add({"a": np.array([True, False])})
    for stored, expected in ((second, {"a": np.array([True, False])}), (first, arrays)):
        found = spool.read(stored)
        assert list(found) == list(expected)
        assert all(np.array_equal(found[k], v) for k, v in expected.items())
        assert all(found[k].dtype == v.dtype for k, v in expected.items())


def test_parts_of_an_answer_are_one_answer():
    nothing = {"lengths": np.zeros(0, int), "cut": np.array(0), "texts": text_array([])}
    parts = [
        {"lengths": np.array([n]), "cut": np.array(n), "texts": text_array([f"é{n}"])}
        | {"logp": np.full(n, -1.5, np.float32)}
        for n in (2, 1)
    ]
    whole = concatenated([nothing, *parts])
    assert whole["lengths"].tolist() == [2, 1] and whole["cut"] == 3
    assert texts_of(whole["texts"]) == ["é2", "é1"]
    assert whole["logp"].dtype == np.float32 and whole["logp"].tolist() == [-1.5] * 3


def evaluated(folder, tokens, model):
    """The log of every metric, asked with this token budget."""
    config = small_tofu.eval_config(folder / "TOFU", f"eval.tofu.token_budget={tokens}")
    tokenizer = tiny.tokenizer()
    config["tofu"]["metrics"] = small_tofu.every_metric()
    (suite,) = build_suites(config, tokenizer=tokenizer, template_args=small_tofu.TEMPLATE_ARGS)
    suite.evaluate(model, folder / str(tokens))
    return json.loads((folder / str(tokens) / "TOFU_EVAL.json").read_text())


def numbers(entry):
    """Every number and text of a log, by its place."""
    if isinstance(entry, dict):
        return {(k, *at): x for k, v in entry.items() for at, x in numbers(v).items()}
    if isinstance(entry, list):
        return numbers(dict(enumerate(entry)))
    return {(): entry}


def test_rows_in_several_blocks_have_the_log_of_rows_in_one(tmp_path, monkeypatch):
    small_tofu.write_splits(tmp_path / "TOFU")
    model = tiny.adapted(tiny.llama(max_position_embeddings=4096))
    counts = []
    original = runner._bounds
    monkeypatch.setattr(
        runner, "_bounds", lambda *args: counts.append(len(b := original(*args))) or b
    )
    whole, parts = (numbers(evaluated(tmp_path, tokens, model)) for tokens in (4096, 30))
    assert min(counts) == 1 and max(counts) > 3
    assert whole.keys() == parts.keys() and len(whole) > 500
    for place, value in whole.items():
        # in other company the last digits of float32 differ
        same = pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value
        assert parts[place] == same, place


def test_the_files_go_with_who_asks_and_wait_for_no_collection():
    asks = runner.PassRunner(None, {}, {}, None, None)
    files = [asks._parts.file, asks.answers._spool.file]
    gc.disable()
    try:
        del asks
        assert all(file.closed for file in files)
    finally:
        gc.enable()


def test_a_file_that_cannot_be_written_out_says_nothing_when_it_goes():
    class Full(io.BytesIO):
        def close(self):
            super().close()
            raise OSError(errno.ENOSPC, "No space left on device")

    spool = Spool(Full())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del spool


def test_without_a_folder_for_temporary_files_it_is_one_sentence(monkeypatch):
    def none():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("tempfile.TemporaryFile", none)
    with pytest.raises(InputError, match="Set TMPDIR to a folder that can be written"):
        Spool()
