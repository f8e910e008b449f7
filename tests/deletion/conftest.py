"""One model for all requests; each test asks a copy of it."""

import pytest
from deletion_runs import make_model


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a root model, a file of rows, and a model that was trained on them."""
    return make_model(tmp_path_factory.mktemp("trained"))
