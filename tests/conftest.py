"""Tests run offline; what they need they make."""

import gc
import importlib.util
import logging
import os
import sys
from collections import defaultdict
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


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(items):
    """Leave all but n cases of a test with `default_cases(n)` to the nightly run."""
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("default_cases") and not is_nightly(item):
            cases[item.function].append(item)
    for function_cases in cases.values():
        count = function_cases[0].get_closest_marker("default_cases").args[0]
        step = (len(function_cases) - 1) / max(count - 1, 1)  # the first and the last are kept
        kept = {round(step * index) for index in range(count)}
        for index, item in enumerate(function_cases):
            if index not in kept:
                item.add_marker("slow")


def is_nightly(item) -> bool:
    """Whether `make test` leaves a test out."""
    return any(item.get_closest_marker(name) for name in ("slow", "faults", "gpu"))


BUDGET = 1.0  # seconds of CPU time that a default test may take on an idle core
CONTENTION = 8  # a slow core, or one that is shared, counts up to so many times as many


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fail a default test that takes long, so that the default tests stay a coffee long."""
    marker = item.get_closest_marker("budget")
    seconds = marker.args[0] if marker else BUDGET
    before, modules = os.times(), len(sys.modules)
    result = yield
    after = os.times()
    took = sum(after[:4]) - sum(before[:4])
    imported = len(sys.modules) - modules > 100  # packages, which the next test has for nothing
    if took > CONTENTION * seconds and not imported and not is_nightly(item):
        pytest.fail(
            f"{took:.1f} s of CPU time; {seconds:g} s are allowed, {CONTENTION} times as many on a "
            "busy machine. Make it smaller, or mark it slow."
        )
    return result
