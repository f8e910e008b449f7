"""Folders as ``datasets`` and the hub lay them out are read where they lie."""

import json

import datasets
import pytest
from pyarrow import Table, parquet

from unlora.data.rows import load_rows
from unlora.errors import InputError

ROWS = [{"question": f"{i}?", "answer": str(i)} for i in range(5)]


@pytest.fixture(autouse=True)
def no_bars():
    datasets.disable_progress_bars()


@pytest.fixture
def saved(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=2)
    return tmp_path / "saved"


@pytest.fixture
def splits(tmp_path):
    two = {"forget": ROWS[:2], "retain": ROWS[2:]}
    made = {name: datasets.Dataset.from_list(rows) for name, rows in two.items()}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "splits")
    return tmp_path / "splits"


def test_a_data_set_that_was_saved_to_disk_is_read(saved, splits):
    assert load_rows(str(saved)) == ROWS
    assert load_rows(str(saved), split="train[1:3]") == ROWS[1:3]
    assert load_rows(str(splits), split="retain") == ROWS[2:]
    assert load_rows(str(splits / "forget")) == ROWS[:2]


def test_it_may_stand_for_a_configuration_of_a_hub_data_set(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "TOFU" / "forget10")
    assert load_rows("locuslab/TOFU", "forget10", datasets_dir=str(tmp_path)) == ROWS


def shards(folder, stem, *parts, of=None):
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(parts):
        if rows is not None:
            name = f"{stem}-{number:05}-of-{of or len(parts):05}.parquet"
            parquet.write_table(Table.from_pylist(rows), folder / name)


def test_the_layout_of_the_hub_is_read(tmp_path):
    shards(tmp_path / "MUSE-News" / "knowmem", "forget_qa", ROWS)
    found = load_rows("muse-bench/MUSE-News", "knowmem", "forget_qa", datasets_dir=str(tmp_path))
    assert found == ROWS
    shards(tmp_path / "mine" / "data", "train", ROWS[:2], ROWS[2:])
    assert load_rows(str(tmp_path / "mine")) == ROWS
    shards(tmp_path / "other" / "full", "train", ROWS[:2], ROWS[2:])
    assert load_rows(str(tmp_path / "other"), "full") == ROWS


def edited(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def broken(what):
    def spoil(folder):
        state = folder / "state.json"
        if what == "state":
            state.write_text("{")
        elif what == "rows":
            (folder / "data-00001-of-00002.arrow").write_bytes(b"ARROW1")
        elif what == "a part":
            (folder / "data-00001-of-00002.arrow").unlink()
        elif what == "outside":
            edited(state, _data_files=[{"filename": "../../other.arrow"}])
        elif what == "nothing":
            edited(state, _data_files=None)
        elif what == "info":
            (folder / "dataset_info.json").write_text("[]")

    return spoil


@pytest.mark.parametrize(
    "what, said",
    [
        ("state", "is not a whole data set of save_to_disk"),
        ("rows", "is not a whole data set of save_to_disk"),
        ("a part", "is not a whole data set of save_to_disk"),
        ("nothing", "is not a whole data set of save_to_disk"),
        ("info", "is not a whole data set of save_to_disk"),
        ("outside", "names a file outside: '../../other.arrow'"),
    ],
)
def test_a_damaged_folder_is_one_sentence(saved, what, said):
    broken(what)(saved)
    with pytest.raises(InputError, match=said) as error:
        load_rows(str(saved))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    "where, said",
    [
        ({"path": "splits"}, "has the splits forget, retain, and not 'train'. Give one of its"),
        ({"path": "splits", "split": "forgot"}, "has the splits forget, retain, and not 'forgot'"),
        ({"path": "saved", "split": "test"}, "is one split, and not 'test'. Set split=train"),
        ({"path": "saved", "name": "full"}, "has no configuration 'full'. Leave name out"),
    ],
)
def test_a_split_that_is_not_there_is_one_sentence(saved, splits, tmp_path, where, said):
    with pytest.raises(InputError, match=said):
        load_rows(**where | {"path": str(tmp_path / where["path"])})


def test_a_part_that_is_missing_is_one_sentence(tmp_path):
    shards(tmp_path / "mine" / "data", "train", ROWS[:2], None, ROWS[2:])
    with pytest.raises(
        InputError, match="the parts of 'train' are not whole: train-00000-of-00003"
    ):
        load_rows(str(tmp_path / "mine"))
    shards(tmp_path / "two" / "data", "train", ROWS[:2])
    shards(tmp_path / "two" / "data", "train", ROWS[:2], ROWS[2:])
    with pytest.raises(InputError, match="are not whole"):
        load_rows(str(tmp_path / "two"))


def test_an_empty_data_set_is_one_sentence(tmp_path):
    empty = datasets.Dataset.from_dict({"question": [], "answer": []})
    empty.save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match="holds no rows|is not a whole data set"):
        load_rows(str(tmp_path / "saved"))
