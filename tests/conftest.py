"""Tests run offline; what they need they make."""

import gc
import importlib.util
import logging
import os
from pathlib import Path

import pytest

# several threads on small tensors wait for each other, above all beside other processes
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="session")
def realdata() -> Path:
    """Real TOFU data, tokenizers and logs, where a machine has them."""
    folder = Path(
        os.environ.get("UNLORA_REALDATA") or Path(__file__).parents[2] / "shared" / "realdata"
    )
    if not folder.is_dir():
        pytest.skip("no real data here: set UNLORA_REALDATA to its folder")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Every test keeps what it computes for later in a folder of its own."""
    monkeypatch.setenv("UNLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def own_logging():
    """A command sets up logging to where a test looks; the next test looks elsewhere."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in [h for h in root.handlers if h not in handlers]:
        if type(handler) is logging.StreamHandler:
            root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def streams_stay_open():
    """absl, which rouge_score imports, closes a stream of pytest's when Hydra sets up logging."""
    if importlib.util.find_spec("absl"):
        from absl.logging import PythonHandler

        PythonHandler.close = logging.StreamHandler.close


@pytest.fixture(scope="session", autouse=True)
def imported_for_good():
    """Trainer collects garbage before every run, and the libraries are most of what it looks at."""
    gc.freeze()
