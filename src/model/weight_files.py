"""Read names, shapes and completeness of weight files before any weights are loaded."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from unlora.errors import InputError
from unlora.runs.safe_loading import read_mapping, refuse_pickle

INDEX = "model.safetensors.index.json"
LFS = b"version https://git-lfs"


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """name -> shape of every tensor in a file; reads its header only.

    Raises:
        InputError: the file is not whole.
    """
    try:
        with open(file, "rb") as stream:
            pointer = stream.read(len(LFS)) == LFS
        if pointer:
            raise InputError(
                f"{str(file)!r} is a pointer of Git LFS and not the weights. Run `git lfs pull`."
            )
        with safe_open(file, framework="np") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"The weights {str(file)!r} are damaged ({error}). Download or copy them again."
        ) from error


def check_model_files(folder: Path) -> None:
    """Raises InputError where a file of weights in a model folder is damaged or missing."""
    index = folder / INDEX
    if index.is_file():
        parts = read_mapping(index).get("weight_map")
        if not isinstance(parts, Mapping):
            raise InputError(f"{str(index)!r} has no weight_map. Download the model again.")
        refuse_pickle(folder)  # no part of the weights may be elsewhere
        names = {str(part) for part in parts.values()}
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            raise InputError(
                f"{str(folder)!r} lacks {', '.join(missing[:3])}: {len(missing)} of the "
                f"{len(names)} files of weights that its index names. Download or copy them again."
            )
    for file in sorted(folder.glob("*.safetensors")):
        shapes(file)
