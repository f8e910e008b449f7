"""Tests run offline; what they need they make."""

import os
from pathlib import Path

import pytest

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
