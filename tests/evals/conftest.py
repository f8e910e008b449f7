import pytest
import tiny


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture
def model():
    return tiny.llama()
