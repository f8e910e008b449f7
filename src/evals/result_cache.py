"""Cache the answers of a model on disk: what was asked once is not asked again.

A file is named by everything that its content depends on and begins with the hash of that content:
whatever is changed has another name, and whatever is damaged is not believed.
"""

import hashlib
import io
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch.distributed as dist

from unlora.evals.passes.batching import rank_and_size
from unlora.runs.atomic_files import is_main_process, write_bytes

HASH = 32
Arrays = dict[str, np.ndarray]
logger = logging.getLogger(__name__)


class ResultCache:
    """The answers that are kept in a folder; without one, none are."""

    def __init__(self, folder: Path | None):
        self.folder = folder

    def has(self, key: str | None) -> bool:
        """Whether an answer is there; whether it is whole shows when it is read."""
        return key is not None and self.folder is not None and self._file(key).is_file()

    def read(self, key: str | None) -> Arrays | None:
        """An answer that is there and whole for every process of this run; else None."""
        arrays = self._read(key) if self.has(key) else None  # type: ignore[arg-type]
        if rank_and_size()[1] > 1:
            everywhere: list[bool] = [False] * rank_and_size()[1]
            dist.all_gather_object(everywhere, arrays is not None)
            return arrays if all(everywhere) else None
        return arrays

    def write(self, key: str | None, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep an answer: the file is there whole, or not at all.

        A disk that is full or not to be written costs the next evaluation time, not this one its
        result.
        """
        if key is None or self.folder is None or not is_main_process():
            return
        stream = io.BytesIO()
        np.savez(stream, allow_pickle=False, **arrays)
        content = stream.getvalue()
        try:
            write_bytes(self._file(key), hashlib.sha256(content).digest() + content)
        except OSError as error:
            logger.warning("Answers are not kept for the next evaluation: %s", error)

    def _file(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.answers"

    def _read(self, key: str) -> Arrays | None:
        try:
            content = self._file(key).read_bytes()
            if hashlib.sha256(content[HASH:]).digest() == content[:HASH]:
                with np.load(io.BytesIO(content[HASH:]), allow_pickle=False) as arrays:
                    return dict(arrays)
        except (OSError, ValueError, zipfile.BadZipFile):
            pass
        logger.warning("%s is damaged; the model is asked again", self._file(key))
        return None
