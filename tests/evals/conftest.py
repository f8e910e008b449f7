import datasets
import pytest
import tiny


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture
def model():
    return tiny.llama()


@pytest.fixture
def lm_eval(monkeypatch, tmp_path):
    """The real package."""
    package = pytest.importorskip("lm_eval", reason="lm-eval is an optional package")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return package
