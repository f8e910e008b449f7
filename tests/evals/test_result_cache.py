"""Answers on disk: what is damaged is not believed, what cannot be written costs no result."""

import io
import logging
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from unlora.evals.result_cache import ResultCache
from unlora.runs.hashes import digest

KEY = digest("one")
ARRAYS = {"logp": np.array([-1.5, float("nan")], dtype=np.float32), "cut": np.array(3)}


@pytest.fixture
def kept(tmp_path):
    return ResultCache(tmp_path / "answers")


def file_of(kept, key=KEY):
    (file,) = kept.folder.rglob(f"{key}*")
    return file


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_what_is_kept_comes_back_bit_for_bit(kept):
    assert not kept.has(KEY)
    kept.write(KEY, ARRAYS)
    assert kept.has(KEY)
    assert_same(kept.read(KEY), ARRAYS)
    assert not kept.has(digest("two")) and kept.read(digest("two")) is None
    assert [file.suffix for file in kept.folder.rglob("*") if file.is_file()] == [".answers"]


def test_without_a_folder_or_a_key_nothing_is_kept(kept):
    kept.write(None, ARRAYS)
    assert not kept.has(None) and kept.read(None) is None and not kept.folder.exists()
    nowhere = ResultCache(None)
    nowhere.write(KEY, ARRAYS)
    assert not nowhere.has(KEY) and nowhere.read(KEY) is None


def truncated(content):
    return content[: len(content) // 2]


def flipped(content):
    place = len(content) - 10
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def foreign(content):
    stream = io.BytesIO()
    np.savez(stream, **ARRAYS)
    return stream.getvalue()


@pytest.mark.parametrize(
    "damage", [truncated, flipped, foreign, lambda c: b"", lambda c: c[:20], lambda c: b"x" * 500]
)
def test_a_damaged_file_is_not_believed_and_is_replaced(damage, kept, caplog):
    kept.write(KEY, ARRAYS)
    file = file_of(kept)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    with caplog.at_level(logging.WARNING):
        assert kept.read(KEY) is None
    assert "is damaged; the model is asked again" in caplog.text
    kept.write(KEY, ARRAYS)
    assert_same(kept.read(KEY), ARRAYS)


def test_objects_are_neither_kept_nor_read(kept):
    with pytest.raises(ValueError, match="pickle|Object arrays"):
        kept.write(KEY, {"x": np.array([{}], dtype=object)})
    assert not kept.has(KEY)


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    kept = ResultCache(tmp_path / "file" / "answers")
    with caplog.at_level(logging.WARNING):
        kept.write(KEY, ARRAYS)
    assert "Answers are not kept" in caplog.text and not kept.has(KEY)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_a_warning(kept, caplog):
    kept.folder.mkdir()
    kept.folder.chmod(0o500)
    kept.write(KEY, ARRAYS)
    assert "Answers are not kept" in caplog.text and kept.read(KEY) is None


def test_a_full_disk_leaves_nothing_half_written(kept, caplog, monkeypatch):
    original = Path.write_bytes

    def half(self, content):
        original(self, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    kept.write(KEY, ARRAYS)
    assert "No space left" in caplog.text
    assert not kept.has(KEY) and not [f for f in kept.folder.rglob("*") if f.is_file()]


def test_only_the_main_process_writes(kept, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    kept.write(KEY, ARRAYS)
    assert not kept.has(KEY)


def write_often(folder, number):
    for _ in range(40):
        ResultCache(folder).write(KEY, {"x": np.full(200_000, number)})


@pytest.mark.slow
def test_two_writers_at_once_leave_a_whole_file(kept, caplog):
    """Whenever it is read it is that of one or of the other."""
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=write_often, args=(kept.folder, n)) for n in (1, 2)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        if kept.has(KEY):
            found = kept.read(KEY)["x"]
            assert len(found) == 200_000 and len(set(found.tolist())) == 1
            seen.add(int(found[0]))
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen and "damaged" not in caplog.text
    assert [file.suffix for file in kept.folder.rglob("*") if file.is_file()] == [".answers"]


def test_a_digest_tells_apart_what_json_tells_apart():
    same = [digest({"a": 1, "b": [2, "x"]}), digest({"b": [2, "x"], "a": 1})]
    assert same[0] == same[1]
    others = [digest(), digest(1), digest("1"), digest([1]), digest("1", ""), digest("", "1"),
              digest("ä"), digest("\ud800"), digest(None), digest(True)]  # fmt: skip
    assert len(set(others)) == len(others)
