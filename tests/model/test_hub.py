"""A hub that does not answer is asked once."""

from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError

from unlora.errors import InputError
from unlora.model import resolve_model

NOT_FOUND = SimpleNamespace(headers={}, status_code=404, request=None)


class Hub:
    """Counts what is asked of it, and answers everything with one error."""

    def __init__(self, monkeypatch):
        self.calls = []
        for function in (
            "huggingface_hub.HfApi.model_info",
            "transformers.utils.hub.hf_hub_download",
            "transformers.utils.peft_utils.cached_file",
        ):
            monkeypatch.setattr(function, self._asked(function.rpartition(".")[2]))

    def _asked(self, function):
        def ask(*_, **__):
            self.calls.append(function)
            raise self.error

        return ask


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return Hub(monkeypatch)


def architecture(name, **args):
    return resolve_model(
        {"model_args": {"pretrained_model_name_or_path": name, **args}}
    ).architecture


@pytest.mark.parametrize(
    "error", [ConnectionError("no route"), TimeoutError(), RuntimeError("TLS")]
)
def test_a_hub_out_of_reach_is_asked_once_and_named(hub, error):
    hub.error = error
    with pytest.raises(InputError, match="'nobody/nowhere' is not in the local cache and the hub"):
        architecture("nobody/nowhere")
    assert hub.calls == ["model_info"]


def test_a_model_that_is_not_on_the_hub_is_said_to_be_missing(hub):
    hub.error = RepositoryNotFoundError("404", response=NOT_FOUND)
    with pytest.raises(InputError, match="There is no model 'nobody/nowhere', neither as a folder"):
        architecture("nobody/nowhere")
    assert len(hub.calls) <= 5  # transformers asks for itself, without waiting


@pytest.mark.parametrize(
    "name, args", [("a/model", {"local_files_only": True}), ("no name of a repository", {})]
)
def test_nothing_is_asked_of_the_hub_beforehand_where_it_cannot_help(hub, name, args):
    hub.error = ConnectionError("no route")
    with pytest.raises(InputError):
        architecture(name, **args)
    assert "model_info" not in hub.calls
