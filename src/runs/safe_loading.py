"""Check third-party files: safetensors only, no code, no paths outside the run's tree."""

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unlora.errors import InputError

INDEX = "*.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
NOT_WEIGHTS = (
    "training_args.bin", "optimizer*.bin", "pytorch_model_fsdp*.bin", "optimizer.pt",
    "scheduler.pt", "scaler.pt", "rng_state*.pth",
)  # fmt: skip
CONVERT = (
    "A pickle can run code when it is read. Convert it where you trust it, with {how}, or take "
    "weights that are safetensors."
)
OF_MODEL = (  # it writes model.safetensors beside the pickles, whether shared, tied or in parts
    "transformers.{kind}.from_pretrained({folder!r}, use_safetensors=False, weights_only=True, "
    "dtype='auto').save_pretrained({folder!r})"
)
OF_FILE = (
    "torch.load({file!r}, weights_only=True) and safetensors.torch.save_file(WEIGHTS, {wanted!r}, "
    "{{'format': 'pt'}})"
)


def pickled_weights(folder: Path) -> list[Path]:
    """The files of a folder in which weights may be pickled."""
    pickles = {file for pattern in PICKLED for file in folder.glob(pattern)}
    return sorted(f for f in pickles if not any(f.match(other) for other in NOT_WEIGHTS))


def how_to_convert(folder: str, kind: str = "AutoModelForCausalLM") -> str:
    """What to do about a model whose weights are pickled."""
    return CONVERT.format(how=OF_MODEL.format(kind=kind, folder=folder))


def refuse_pickle(
    folder: Path, wanted: str = "model.safetensors", kind: str = "AutoModelForCausalLM"
) -> None:
    """Stop where the weights in a folder are pickled.

    Args:
        wanted: the file that should be there.
        kind: the class of transformers that reads the model.

    Raises:
        InputError: there are pickles and no safetensors, or an index of safetensors names a file
            of another kind or in another folder.
    """
    pickles = pickled_weights(folder)
    if pickles and not any(folder.glob("*.safetensors")):
        command = OF_FILE.format(file=str(pickles[0]), wanted=str(folder / wanted))
        whole = any(folder.glob("pytorch_model*.bin"))
        raise InputError(
            f"The weights {str(pickles[0])!r} are pickled and are not read. "
            + (how_to_convert(str(folder), kind) if whole else CONVERT.format(how=command))
        )
    for index in folder.glob(INDEX):
        for name in _shards(index):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise InputError(
                    f"{str(index)!r} names {name!r} as a part of the weights. It may name nothing "
                    "but .safetensors files in its own folder. Download the model again."
                )


def _shards(index: Path) -> set[str]:
    content = read_mapping(index)
    shards = content.get("weight_map")
    if not isinstance(shards, Mapping):
        raise InputError(f"{str(index)!r} has no weight_map. Download the model again.")
    return {str(name) for name in shards.values()}


def read_json(file: Path) -> Any:
    """What a JSON file says.

    Raises:
        ValueError: it is no JSON, or is nested deeper than Python reads.
        OSError: it cannot be read.
    """
    try:
        return json.loads(file.read_text("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_mapping(
    file: Path, *, key: str = "", what: str = "", remedy: str = "Download or copy it again."
) -> Mapping[str, Any]:
    """What a JSON file says that holds keys.

    Args:
        key: of the config that names the file, for the message.
        what: it should be, likewise.
        remedy: what to do about it.

    Raises:
        InputError: it does not.
    """
    name = f"{key} {str(file)!r}".lstrip()
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{name} is not JSON: {error}. {remedy}") from error
    if not isinstance(content, dict):
        why = f"is no {what}: it holds no mapping" if what else "holds no mapping"
        raise InputError(f"{name} {why}. {remedy}")
    return content


def near(path: str | Path, run: Path) -> bool:
    """Whether a path that a file in the folder ``run`` names may be followed.

    Links are followed first. It may lie below the working directory, below the tree that the run is
    in (the folder ``saves`` above it, or else the second folder above it), or below a folder that
    the user names in ``UNLORA_MODELS``, several with a colon between them.
    """
    real, folder = Path(os.path.realpath(path)), Path(os.path.realpath(run))
    saves = [parent for parent in folder.parents if parent.name == "saves"]
    tree = saves[0] if saves else folder.parents[min(1, len(folder.parents) - 1)]
    roots = [root for root in (tree, Path.cwd().resolve()) if root != Path(root.anchor)]
    named = os.environ.get("UNLORA_MODELS", "").split(os.pathsep)
    roots += [
        Path(os.path.realpath(os.path.expanduser(directory))) for directory in named if directory
    ]
    return any(real == root or root in real.parents for root in roots)


def trusted(folder: str) -> str:
    """What to type before a command so that a folder is :func:`near` every run."""
    return f"UNLORA_MODELS={shlex.quote(os.path.realpath(folder))}"
