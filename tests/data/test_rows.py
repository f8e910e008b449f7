"""Rows are found where a user put them, and nothing is fetched where local files were asked for."""

import json
import logging
from pathlib import Path

import pytest

from unlora.data.rows import column, load_rows, read_file
from unlora.errors import InputError

ROWS = [{"question": "Who?", "answer": "Ana\u2028Silva"}, {"question": "When?", "answer": "1950"}]


def write(file: Path, rows: list[dict] = ROWS) -> Path:
    """The rows in the format that the file's name asks for."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif file.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(f'"{v}"' for v in row.values()) for row in rows)]
        file.write_text("\n".join(lines), "utf-8")
    else:
        file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    return file


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    def fetched(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("datasets.load_dataset", fetched)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".csv"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    rows = ROWS if suffix != ".csv" else [{**ROWS[0], "answer": "Ana, Silva"}, ROWS[1]]
    assert read_file(write(tmp_path / f"rows{suffix}", rows)) == rows


def test_json_may_be_one_array(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(ROWS, indent=1), "utf-8")
    assert read_file(file) == ROWS


@pytest.mark.parametrize(
    "place",
    [
        "TOFU/forget10_perturbed.json",
        "tofu/forget10_perturbed.jsonl",
        "Tofu/forget10_perturbed.parquet",
        "locuslab/TOFU/forget10_perturbed.json",
        "tofu/forget10_perturbed/train.json",
    ],
)
def test_hub_data_sets_are_found_in_the_local_folder(tmp_path, place):
    write(tmp_path / place)
    found = load_rows("locuslab/TOFU", "forget10_perturbed", datasets_dir=str(tmp_path))
    assert found == ROWS


def test_the_folder_of_that_exact_name_comes_first(tmp_path):
    write(tmp_path / "tofu/full.json", ROWS[:1])
    write(tmp_path / "TOFU/full.json", ROWS[1:])
    if len(list(tmp_path.iterdir())) == 1:
        pytest.skip("this file system does not tell the two names apart")
    assert load_rows("locuslab/TOFU", "full", datasets_dir=str(tmp_path)) == ROWS[1:]


def test_a_set_without_configurations_is_found_by_its_split(tmp_path):
    write(tmp_path / "MUSE-News-Train/retain.json")
    found = load_rows("tamarsonha/MUSE-News-Train", split="retain", datasets_dir=str(tmp_path))
    assert found == ROWS


def test_the_path_may_be_a_file_or_a_folder(tmp_path):
    file = write(tmp_path / "mine/full.json")
    assert load_rows(str(file)) == ROWS
    assert load_rows(str(tmp_path / "mine"), "full") == ROWS
    assert load_rows(str(tmp_path / "mine"), data_files="full.json") == ROWS
    assert load_rows("json", data_files=str(file)) == ROWS


MANY = [{"question": str(i), "answer": str(i)} for i in range(20)]


@pytest.mark.parametrize(
    "split, first, last",
    [
        ("train", 0, 20), ("train[:5]", 0, 5), ("train[10:20]", 10, 20), ("train[:10%]", 0, 2),
        ("train[50%:]", 10, 20), ("train[-3:]", 17, 20), ("train[:99]", 0, 20),
    ],
)  # fmt: skip
def test_a_slice_is_those_rows(tmp_path, split, first, last):
    file = write(tmp_path / "TOFU/full.json", MANY)
    assert load_rows(str(file), split=split) == MANY[first:last]
    assert load_rows("json", data_files=str(file), split=split) == MANY[first:last]
    assert load_rows("locuslab/TOFU", "full", split, datasets_dir=str(tmp_path)) == MANY[first:last]


def test_a_slice_of_the_embedded_benchmark_is_those_rows():
    assert load_rows("pocket", "forget10", "train[:3]") == load_rows("pocket", "forget10")[:3]
    with pytest.raises(InputError, match="only the split train"):
        load_rows("pocket", "forget10", "validation")


@pytest.mark.parametrize(
    "split, said",
    [
        ("validation", "only the split train, not 'validation'"),
        ("train[5:5]", "none of the 20 rows"),
        ("train+test", "is not understood"),
        ("train[:5", "is not understood"),
        ("train[:5]+train[6:]", "is not understood"),
    ],
)
def test_a_split_that_a_file_does_not_have_is_refused(tmp_path, split, said):
    file = write(tmp_path / "full.json", MANY)
    for arguments in ({"path": str(file)}, {"path": "json", "data_files": str(file)}):
        with pytest.raises(InputError) as error:
            load_rows(**arguments, split=split)
        assert said in str(error.value)


def test_a_mistyped_name_or_split_does_not_fall_back_on_other_rows(tmp_path):
    write(tmp_path / "TOFU/forget10.json")
    write(tmp_path / "TOFU/train.json")
    for path, datasets_dir in (("locuslab/TOFU", tmp_path), (tmp_path / "TOFU", None)):
        where = {"path": str(path), "datasets_dir": datasets_dir and str(datasets_dir)}
        assert load_rows(**where) == ROWS
        with pytest.raises(InputError, match=r"no forget01\.\* or forget01/train\.\*"):
            load_rows(**where, name="forget01")
        with pytest.raises(InputError, match=r"no forget10/validation\.\*"):
            load_rows(**where, name="forget10", split="validation")


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path):
    for path in ("nofile.jsonl", str(tmp_path / "nowhere"), "./nowhere"):
        for datasets_dir in (None, str(tmp_path)):
            with pytest.raises(InputError, match="There is no file or folder"):
                load_rows(path, datasets_dir=datasets_dir)
    write(tmp_path / "TOFU/full.json")
    with pytest.raises(InputError, match=r"data_files: there is no file .*fulll\.json"):
        load_rows("locuslab/TOFU", "full", datasets_dir=str(tmp_path), data_files="fulll.json")


def test_a_cell_may_be_long_and_hold_any_separator(tmp_path):
    file = tmp_path / "books.csv"
    book = "a\u2028b " * 50_000
    file.write_text(f'title,text\nOne,{book}\nTwo,"a\nb"\n', "utf-8")
    assert [row["text"] for row in load_rows(str(file))] == [book, "a\nb"]


def test_whole_numbers_beside_empty_cells_are_whole(tmp_path, caplog):
    """Tables store them as 1999.0; so does pandas in JSON."""
    rows = [{"question": "When?", "answer": 1999.0, "share": 0.5},
            {"question": "Where?", "answer": None, "share": 2.0}]  # fmt: skip
    wanted = [rows[0] | {"answer": 1999}, rows[1]]
    for suffix in (".parquet", ".json"):
        with caplog.at_level(logging.INFO):
            found = load_rows(str(write(tmp_path / f"rows{suffix}", rows)))
        assert found == wanted and type(found[0]["answer"]) is int
        assert "are read as whole numbers in the columns answer" in caplog.text
        caplog.clear()
    assert [row["share"] for row in found] == [0.5, 2.0], "one is none, so they are fractions"


def test_a_fraction_is_as_short_as_it_was_written(tmp_path):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"answer": pyarrow.array([0.1, 2.5, None], pyarrow.float32())})
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert [row["answer"] for row in load_rows(str(tmp_path / "rows.parquet"))] == [0.1, 2.5, None]


@pytest.mark.parametrize("cell", ['6" wide', 'the "River"', '""', '"a ""b"" c"', '"a\nb"'])
def test_quotes_that_are_closed_or_within_a_cell_are_read(tmp_path, cell):
    (tmp_path / "rows.csv").write_text(f"a,b\n1,{cell}\n2,x\n")
    found = load_rows(str(tmp_path / "rows.csv"))
    assert [row["b"] for row in found[-1:]] == ["x"] and len(found) == 2


def test_lines_of_text_are_rows(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("One.\n\nTwo.\n", "utf-8")
    assert load_rows(str(file)) == [{"text": "One."}, {"text": "Two."}]


def test_the_embedded_benchmark_needs_no_files():
    rows = load_rows("pocket", "forget10")
    assert rows and {"question", "answer"} <= set(rows[0])
    rows[0]["answer"] = "changed"
    assert load_rows("pocket", "forget10")[0]["answer"] != "changed"


def test_a_local_file_that_is_missing_names_what_is_there(tmp_path):
    write(tmp_path / "TOFU/forget10.json")
    with pytest.raises(InputError, match=r"no forget05\.\* or .*; it has: forget10\.json"):
        load_rows("locuslab/TOFU", "forget05", datasets_dir=str(tmp_path))
    with pytest.raises(InputError, match="no folder 'MUSE-News'.*it has: TOFU"):
        load_rows("muse-bench/MUSE-News", "raw", datasets_dir=str(tmp_path))
    with pytest.raises(InputError, match="there is no such folder"):
        load_rows("locuslab/TOFU", "full", datasets_dir=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("rows.json", b"", "holds no rows"),
        ("rows.json", b"[]", "holds no rows"),
        ("rows.json", b'{"a": 1}\n{"a": 2\n', "line 2: "),
        ("rows.json", b'[{"a": 1},\n{"a" 2}]', "line 2: "),
        ("rows.jsonl", b"I don't know.\n", "Each line must hold one row as JSON"),
        ("rows.json", b"[1, 2]", "row 1 is 1; a row must be an object"),
        ("rows.json", '{"a": "é"}'.encode("latin-1"), "is not UTF-8 text"),
        ("rows.parquet", b"not parquet", "is not a parquet file"),
        ("rows.xlsx", b"", "of an unknown kind"),
        ("rows.csv", b"a,b\n1,2\n3,4,5\n", "row 2 has more cells than the header has names"),
        ("rows.csv", b"a;b\n1;2\n", "Cells must have a comma between them, not a semicolon"),
        ("rows.csv", b"a,b\n,\n", "holds no rows"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, content, said):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(InputError) as error:
        load_rows(str(file))
    assert said in str(error.value) and name in str(error.value)


@pytest.mark.parametrize("name", ["DATA.CSV", "a.JsonL", "b.TXT", "c.PARQUET"])
def test_names_of_files_end_in_letters_of_any_size(tmp_path, name):
    made = write(tmp_path / name.lower(), [{"text": "One."}])
    if name == "b.TXT":
        made.write_text("One.\n")
    made.rename(tmp_path / name)
    assert load_rows(str(tmp_path / name)) == [{"text": "One."}]


def test_lines_of_commas_alone_are_no_rows(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n,\n\n, ,,\n3,\n")
    assert load_rows(str(tmp_path / "rows.csv")) == [{"a": "1", "b": "2"}, {"a": "3", "b": ""}]


def test_a_missing_column_names_the_nearest():
    assert column(ROWS, "answer", "TOFU") == ["Ana\u2028Silva", "1950"]
    with pytest.raises(InputError, match="Did you mean 'answer'"):
        column(ROWS, "anwser", "TOFU")


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'locuslab/TOFU' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(InputError, match="paths.datasets_dir=FOLDER"):
        load_rows("locuslab/TOFU", "full")


def test_real_tofu_is_read_whole(realdata):
    sizes = {"full": 4000, "forget10_perturbed": 400, "holdout10": 400, "world_facts": 117}
    for name, size in sizes.items():
        assert len(load_rows("locuslab/TOFU", name, datasets_dir=str(realdata))) == size
    row = load_rows("locuslab/TOFU", "forget10_perturbed", datasets_dir=str(realdata))[0]
    assert len(row["perturbed_answer"]) == 5


def test_rows_are_chosen_and_left_out_by_their_numbers(tmp_path):
    rows = [{"question": f"{n}?", "year": "" if n == 3 else float(n)} for n in range(5)]
    file = write(tmp_path / "rows.json", rows)
    assert [row["question"] for row in load_rows(str(file), exclude=[0, 3])] == ["1?", "2?", "4?"]
    assert [row["question"] for row in load_rows(str(file), select=[4, 1])] == ["4?", "1?"]
    assert load_rows(str(file), select=[1, 2], exclude=[2])[0]["question"] == "1?"
    assert load_rows("pocket", "full", exclude=[0]) == load_rows("pocket", "full")[1:]
    # as a file without the row is read: of its years, all are whole numbers
    without = write(tmp_path / "without.json", [row for row in rows if row["year"] != ""])
    assert load_rows(str(file), exclude=[3]) == load_rows(str(without))
    assert load_rows(str(without))[1]["year"] == 1 and load_rows(str(file))[3]["year"] == ""


@pytest.mark.parametrize("numbers", [{"exclude": [2]}, {"select": [-1]}])
def test_the_number_of_no_row_is_refused(tmp_path, numbers):
    with pytest.raises(InputError, match="its rows have the numbers 0 to 1. Has the data changed?"):
        load_rows(str(write(tmp_path / "rows.jsonl")), **numbers)
    with pytest.raises(InputError, match="leave none of the 2 rows"):
        load_rows(str(write(tmp_path / "rows.jsonl")), exclude=[0, 1])
