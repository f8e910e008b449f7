"""Read a GGUF file, as llama.cpp and Ollama have models, into a model folder of safetensors."""

import functools
import logging
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from unlora.data.cache import cache_folder
from unlora.errors import InputError
from unlora.runs.atomic_files import write_json
from unlora.runs.safe_loading import read_json

SUFFIX = ".gguf"
SOURCE = "gguf.json"  # in the folder: what its weights were
NEEDED = "0.10.0"  # of the package gguf, for the reader of transformers
# of weights that are not rounded; all others are kept in bfloat16
EXACT = {"F32": torch.float32, "F16": torch.float16}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GGUF:
    """How the weights of a file are stored.

    Attributes:
        type: of most of them, such as ``Q4_1``.
        bits: of a weight, on average, with the scales of its block.
    """

    file: str
    type: str
    bits: float
    weights: int


def in_words(stored: GGUF) -> str:
    """What became of the weights."""
    if stored.type in EXACT:
        return f"{stored.weights:,} weights of {stored.type}"
    return (
        f"{stored.weights:,} weights that were rounded to {stored.type} ({stored.bits:.1f} bits "
        "each), now in bfloat16"
    )


def is_gguf(path: str) -> bool:
    """Whether a path is written as that of a GGUF file."""
    return path.lower().endswith(SUFFIX) and not os.path.isdir(path)


@functools.cache
def model_folder(path: str) -> Path:
    """The folder in the cache that a file was read into; read on first use, whole or not at all.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"There is no file {path!r} to load a model from.")
    stat = file.stat()
    name = f"{file.stem}-{stat.st_size}-{stat.st_mtime_ns}"
    folder = cache_folder() / "gguf" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            write_model_folder(file, folder)
    stored = GGUF(**read_json(folder / SOURCE))
    logger.info("%s is read as %s, in %s", path, in_words(stored), folder)
    return folder


def write_model_folder(file: Path, folder: Path) -> GGUF:
    """Write weights, tokenizer and chat template of a GGUF file as transformers has them.

    Raises:
        InputError: the file cannot be read.
    """
    stored = describe(file)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        _convert(file, unfinished, EXACT.get(stored.type, torch.bfloat16))
        write_json(unfinished / SOURCE, asdict(stored))
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return stored


def describe(file: Path) -> GGUF:
    """How a file stores its weights; reads no weights.

    Raises:
        InputError: the package is missing, or the file is damaged or no GGUF file.
    """
    require_package()
    from gguf import GGUFReader

    with open(file, "rb") as stream:
        if stream.read(4) != b"GGUF":
            raise InputError(f"{str(file)!r} is no GGUF file: it does not begin with GGUF.")
    try:
        tensors = GGUFReader(file).tensors
    except Exception as error:  # whatever numpy says of bytes that are not there
        raise InputError(
            f"{str(file)!r} is damaged or was cut short ({error}). Download or copy it again."
        ) from error
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    total = sum(sizes.values())
    bits = 8 * sum(int(tensor.n_bytes) for tensor in tensors) / max(total, 1)
    return GGUF(file.name, sizes.most_common(1)[0][0] if sizes else "nothing", bits, total)


def require_package() -> None:
    """Raises InputError where the package that reads such files is missing or too old."""
    try:
        version = metadata.version("gguf")
    except metadata.PackageNotFoundError as error:
        raise InputError(
            "To read a GGUF file the package gguf is needed. Run: pip install 'unlora[gguf]'."
        ) from error
    if tuple(map(int, version.split(".")[:2])) < tuple(map(int, NEEDED.split(".")[:2])):
        raise InputError(
            f"The package gguf is {version}; {NEEDED} or newer is needed. Run: pip install -U gguf."
        )


def _convert(file: Path, folder: Path, dtype: torch.dtype) -> None:
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except Exception as error:  # a file of others fails in ways of its own
        text = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"transformers cannot read {str(file)!r}: {text[:250].rstrip('.')}. Give the model as "
            "a folder of safetensors, or one of an architecture that it reads from GGUF."
        ) from error
    _plain(read).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _drop_tokens_from(read.config.vocab_size, folder / "tokenizer.json")


def _drop_tokens_from(size: int, file: Path) -> None:
    """Take out what transformers adds of its own, <|endoftext|>, where the model has no such token.

    It would have no embedding.
    """
    content = read_json(file)
    tokens = content["added_tokens"]
    content["added_tokens"] = [token for token in tokens if token["id"] < size]
    if len(content["added_tokens"]) < len(tokens):
        write_json(file, content)


def _plain(read: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that does not call itself quantised, as what was read does.

    transformers would refuse to write that one.
    """
    settings: dict[str, Any] = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    with torch.device("meta"):
        model: PreTrainedModel = type(read)(type(read.config)(**settings))
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    return model
