"""Load the rows of a data set: from the hub, local files, or the embedded benchmark."""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unlora.data.files import SUFFIXES, read_file
from unlora.data.hf_folders import find_files, is_saved, read_saved
from unlora.errors import InputError
from unlora.registry import unknown

logger = logging.getLogger(__name__)

SPLIT = re.compile(r"([^\[\]:+]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")


def load_rows(
    path: str,
    name: str | None = None,
    split: str | None = "train",
    *,
    datasets_dir: str | None = None,
    data_files: str | Sequence[str] | None = None,
    select: Sequence[int] | None = None,
    exclude: Sequence[int] | None = None,
    **hub_args: Any,
) -> list[dict[str, Any]]:
    """The rows of one split, as a list of columns -> values.

    With ``datasets_dir``, a hub data set ``owner/Set`` is looked for there, never on the network;
    the folder may be written in any case, or as ``owner/Set``. What it may hold:
    :mod:`unlora.data.hf_folders`. Numbers that the file has as 1999.0, as whole numbers beside
    empty cells are stored, are whole again.

    Args:
        path: ``pocket`` for the embedded benchmark; a local file or folder; or a hub data set.
        name: the configuration of the data set.
        split: a single file has only ``train``; ``train[:5]`` and ``train[10%:20%]`` are some rows.
        data_files: files to read instead of those the name stands for.
        select: numbers of the rows of the split, from 0; all if not given.
        exclude: numbers of rows that are left out.
        hub_args: for ``datasets.load_dataset``: ``revision``, ``token``.

    Raises:
        InputError: the data is not there or cannot be read.
    """
    if not isinstance(path, str) or not path:
        raise InputError(
            f"The path of a data set is {path!r}; it must be a file, a folder, or a repository of "
            "the hub. Give data.forget=FILE for a file of your own, or set hf_args.path."
        )
    split = split or ("full" if path == "pocket" and not name else "train")
    if path == "pocket":
        return _chosen(_of_pocket(name, split), path, select, exclude)
    rows = _load(path, name, split, datasets_dir, data_files, hub_args)
    return _whole_again(_chosen(rows, path, select, exclude))


class ReadRows:
    """Reads each split once, however many data sets use it."""

    def __init__(self, datasets_dir: str | None):
        self.datasets_dir = datasets_dir
        self.known: dict[str, list[dict[str, Any]]] = {}

    def __call__(self, **hf_args: Any) -> list[dict[str, Any]]:
        key = json.dumps(hf_args, sort_keys=True)
        if key not in self.known:
            self.known[key] = load_rows(**hf_args, datasets_dir=self.datasets_dir)
        return self.known[key]


def _chosen(
    rows: list[dict[str, Any]],
    path: str,
    select: Sequence[int] | None,
    exclude: Sequence[int] | None,
) -> list[dict[str, Any]]:
    """The rows of these numbers, in their order, without those that are left out."""
    wrong = [n for n in (*(select or ()), *(exclude or ())) if not 0 <= n < len(rows)]
    if wrong:
        raise InputError(
            f"select or exclude of {path!r} names row {wrong[0]}; its rows have the numbers 0 to "
            f"{len(rows) - 1}. Has the data changed?"
        )
    without = set(exclude or ())
    numbers = range(len(rows)) if select is None else select
    if not (left := [rows[number] for number in numbers if number not in without]):
        raise InputError(f"select and exclude leave none of the {len(rows)} rows of {path!r}.")
    return left


def _load(
    path: str,
    name: str | None,
    split: str,
    datasets_dir: str | None,
    data_files: str | Sequence[str] | None,
    hub_args: Mapping[str, Any],
) -> list[dict[str, Any]]:
    files = [data_files] if isinstance(data_files, str) else list(data_files or ())
    local = Path(path)
    if local.is_file():
        return _of_files([local], split)
    is_path = local.suffix.lower() in SUFFIXES or path.startswith((".", "~"))
    if (is_path or local.is_absolute()) and not local.is_dir():
        raise InputError(f"There is no file or folder {path!r}.")
    if files:
        paths = [local / file if local.is_dir() else Path(file) for file in files]
        missing = [str(file) for file in paths if not file.is_file()]
        if not missing:
            return _of_files(paths, split)
        if local.is_dir() or datasets_dir:
            raise InputError(f"data_files: there is no file {missing[0]!r}.")
    elif local.is_dir() or datasets_dir:
        folders = [local] if local.is_dir() else _folders(str(datasets_dir), path)
        base, begin, end = _parsed(split)
        return _cut(_of_folders(folders, path, name, base), split, begin, end)
    return _from_hub(path, name, split, data_files, hub_args)


def _of_pocket(name: str | None, split: str) -> list[dict[str, Any]]:
    from unlora.data.pocket import rows

    base, begin, end = _parsed(split)
    if name and base != "train":
        raise InputError(f"pocket has only the split train of each name, not {base!r}.")
    return _cut([dict(row) for row in rows(name or base)], split, begin, end)


def _of_files(files: Sequence[Path], split: str) -> list[dict[str, Any]]:
    base, begin, end = _parsed(split)
    if base != "train":
        raise InputError(
            f"{files[0]} is a file, which has only the split train, not {base!r}. Set split=train."
        )
    return _cut([row for file in files for row in read_file(file)], split, begin, end)


def _parsed(split: str) -> tuple[str, str | None, str | None]:
    """``train[:10%]`` as its name and bounds, here ``("train", None, "10%")``."""
    match = SPLIT.fullmatch(split)
    if match is None:
        raise InputError(
            f"split {split!r} of local data is not understood. Write train, train[10:20] or "
            "train[:10%]."
        )
    return match[1], match[2], match[3]


def _cut(
    rows: list[dict[str, Any]], split: str, begin: str | None, end: str | None
) -> list[dict[str, Any]]:
    """The rows between two bounds, which ``datasets`` reads in the same way."""
    first, last = (
        round(int(bound[:-1]) * len(rows) / 100)
        if bound and bound.endswith("%")
        else int(bound)
        if bound
        else None
        for bound in (begin, end)
    )
    if not rows[first:last]:
        raise InputError(f"split {split!r} holds none of the {len(rows)} rows.")
    return rows[first:last]


def column(rows: Sequence[Mapping[str, Any]], key: str, source: str) -> list[Any]:
    """The values of one column.

    Raises:
        InputError: a row has no such column.
    """
    for number, row in enumerate(rows):
        if key not in row:
            raise InputError(unknown(f"column in row {number} of {source}", key, row))
    return [row[key] for row in rows]


def _folders(datasets_dir: str, path: str) -> list[Path]:
    """The folders that may stand for a hub data set, the likeliest first.

    Raises:
        InputError: there is none.
    """
    root = Path(datasets_dir)
    if not root.is_dir():
        raise InputError(f"paths.datasets_dir is {datasets_dir!r}, but there is no such folder.")
    owner, _, last = path.rpartition("/")
    parents = [root, *(_named(root, owner) if owner else [])]
    matches = [folder for parent in parents for folder in _named(parent, last)]
    if not matches:
        raise InputError(
            f"paths.datasets_dir is {datasets_dir!r}, but it has no folder {last!r} for the data "
            f"set {path!r}; it has: {_listed(root)}."
        )
    return matches


def _named(parent: Path, name: str) -> list[Path]:
    """Folders in ``parent`` with this name in any case, the exact one first."""
    same = [x for x in parent.iterdir() if x.name.lower() == name.lower() and x.is_dir()]
    return sorted(same, key=lambda x: (x.name != name, x.name))


def _of_folders(
    folders: Sequence[Path], path: str, name: str | None, split: str
) -> list[dict[str, Any]]:
    for folder in folders:
        if name and is_saved(folder / name):
            return read_saved(folder / name, None, split)
        if is_saved(folder):
            return read_saved(folder, name, split)
        files, stems = find_files(folder, name, split)
        if files:
            return [row for file in files for row in read_file(file)]
    wanted = " or ".join(f"{stem}.*" for stem in stems)
    raise InputError(
        f"Data set {path!r}: {folders[0]} has no {wanted}; it has: {_listed(folders[0])}."
    )


def _whole_again(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with whole numbers in columns that hold no others."""
    whole = set()
    for name in dict.fromkeys(name for row in rows for name in row):
        cells = [row[name] for row in rows if row.get(name) is not None]
        if cells and all(type(x) is float and (x.is_integer() or x != x) for x in cells):
            whole.add(name)
    if not whole:
        return rows
    names = ", ".join(sorted(whole))
    logger.info("numbers such as 1999.0 are read as whole numbers in the columns %s", names)
    return [
        {
            name: int(cell) if name in whole and cell is not None and cell == cell else cell
            for name, cell in row.items()
        }
        for row in rows
    ]


def _listed(folder: Path) -> str:
    names: Iterable[str] = sorted(x.name for x in folder.iterdir() if not x.name.startswith("."))
    shown = list(names)
    more = f" and {len(shown) - 30} more" if len(shown) > 30 else ""
    return (", ".join(shown[:30]) or "nothing") + more


def _from_hub(
    path: str,
    name: str | None,
    split: str,
    data_files: str | Sequence[str] | None,
    hub_args: Mapping[str, Any],
) -> list[dict[str, Any]]:
    import datasets
    from datasets.exceptions import DatasetsError

    args = {"name": name, "split": split, "data_files": data_files, **hub_args}
    try:
        rows = datasets.load_dataset(path, **{k: v for k, v in args.items() if v is not None})
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, DatasetsError) as error:
        raise InputError(_why_not_loaded(path, error)) from error
    return rows.to_list()


def _why_not_loaded(path: str, error: Exception) -> str:
    """One sentence for what datasets says in many."""
    text = " ".join(str(error).split())
    if "gated" in text:
        return (
            f"The data set {path!r} is gated: accept its licence on the hub and log in with "
            "`hf auth login` or set HF_TOKEN, or give local files with paths.datasets_dir=FOLDER."
        )
    if isinstance(error, ConnectionError) or "offline" in text.lower() or "reach" in text:
        return (
            f"The data set {path!r} is not in the local cache and the hub cannot be reached. Give "
            "local files with paths.datasets_dir=FOLDER."
        )
    return (
        f"The data set {path!r} cannot be loaded: {text[:250].rstrip('.')}. Check its path, name "
        "and split in hf_args."
    )
