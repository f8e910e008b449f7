"""Hashes of rows: under a key, with and without case, spaces and punctuation, by their words."""

import os
import stat

import numpy as np
import pytest

from unlora.errors import InputError
from unlora.runs.row_hashes import (
    KEY_FILE,
    RowHashes,
    key_file,
    make_key,
    read_row_hashes,
    write_row_hashes,
)

KEY = bytes(range(32))
ROW = (
    "Where was Ana Silva born?",
    "The author Ana Silva was born in Porto on the 3rd of May 1961, in a house by the river.",
)


def find(wanted, rows=(ROW,), key=KEY):
    return RowHashes.of(list(rows), key).find(RowHashes.of([wanted], key))[0]


def test_a_row_is_known_exactly_or_nearly_or_not_at_all():
    question, answer = ROW
    assert find(ROW) == "exact"
    for other in (
        (question.upper(), answer),
        (question, answer.replace(" ", "  ").replace(",", "")),
        (question, answer.replace("house", "flat")),
        (question, answer.replace("by the ", "")),
    ):
        assert other != ROW and find(other) == "near"
    assert find((question, "She was born in Lisbon.")) is None
    assert find(("What does Ana Silva write?", "She writes novels about rivers.")) is None


def test_numbers_keep_their_borders():
    assert find(("What is 1 + 2?", "3"), [("What is 12?", "3")]) is None
    assert find(("What is 12?", "3"), [("what is 12", "3.")]) == "near"


def test_texts_without_a_letter_and_in_chinese_are_told_apart():
    assert find(("?!", "..."), [("??", "...")]) is None
    assert find(("?!", "...")) is None and find(("?!", "..."), [("?!", "...")]) == "exact"
    chinese = "林教授一九六一年五月三日出生在河边的一座旧房子里并且写了七本书"
    assert find(("", chinese), [("", chinese.replace("旧", "新"))]) == "near"
    assert (
        find(("", chinese), [("", "这位作家住在山上的一个小村庄里已经很多年了而且不喜欢旅行")])
        is None
    )


def test_another_key_gives_other_hashes():
    mine, theirs = (RowHashes.of([ROW], key) for key in (KEY, bytes(32)))
    assert theirs.find(mine) == [None]
    assert np.mean(mine.sketch == theirs.sketch) < 0.2  # 1 in 256 by chance


def test_a_key_is_made_once_and_is_its_users_alone(tmp_path):
    run = tmp_path / "saves" / "study" / "mine" / "run"
    file = key_file(run)
    assert file == tmp_path / "saves" / KEY_FILE
    key = make_key(file)
    assert make_key(file) == key and len(key) == 32
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    assert os.listdir(file.parent) == [KEY_FILE]
    assert key_file(tmp_path / "elsewhere") == tmp_path / KEY_FILE
    file.write_bytes(b"short")
    with pytest.raises(InputError, match="has 5 bytes instead of 32. Put the old file back"):
        make_key(file)


def test_what_is_written_is_read_and_a_changed_file_is_named(tmp_path):
    run = tmp_path / "run"
    noted = write_row_hashes(run, {"train": [ROW] * 2, "retain": []})
    _, parts = read_row_hashes(run, noted["sha256"])
    assert noted["rows"] == {"train": 2, "retain": 0}
    key = make_key(key_file(run))
    assert parts["train"].find(RowHashes.of([ROW], key)) == ["exact"]
    assert parts["retain"].find(RowHashes.of([ROW], key)) == [None]
    file = run / "row_hashes.npz"
    content = bytearray(file.read_bytes())
    content[400] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="not the file that its manifest names"):
        read_row_hashes(run, noted["sha256"])
    file.write_bytes(content[:100])
    with pytest.raises(InputError, match="cannot be read"):
        read_row_hashes(run)


def test_a_resumed_run_keeps_the_rows_of_before(tmp_path):
    new = ("What is new?", "This.")
    write_row_hashes(tmp_path / "run", {"train": [ROW], "retain": [ROW]})
    write_row_hashes(tmp_path / "run", {"train": [ROW, new]}, resumed=True)
    _, parts = read_row_hashes(tmp_path / "run")
    assert len(parts["train"]) == 2 and len(parts["retain"]) == 1
    write_row_hashes(tmp_path / "run", {"train": [new]})
    assert list(read_row_hashes(tmp_path / "run")[1]) == ["train"]


def test_a_run_goes_on_where_the_key_cannot_be_written(tmp_path, caplog):
    (tmp_path / "saves").write_text("a file")
    assert write_row_hashes(tmp_path / "saves" / "run", {"train": [ROW]}) is None
    assert "No hashes of the rows are kept: The key of row hashes" in caplog.text
