"""A model section is understood once."""

import pytest
import tiny

from unlora.config.resolve import model_section
from unlora.errors import InputError
from unlora.model import ResolvedModel, check_model, load_tokenizer, resolve_model
from unlora.model.fingerprints import identities
from unlora.model.lineage import Lineage


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("root")
    tiny.llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def of(path, **keys):
    return {"model_args": {"pretrained_model_name_or_path": str(path)}, **keys}


@pytest.fixture
def reads(monkeypatch):
    """The paths whose lineage was read."""
    paths, read = [], Lineage.read
    monkeypatch.setattr(
        Lineage, "read", lambda path, *args: paths.append(path) or read(path, *args)
    )
    return paths


@pytest.mark.parametrize("as_trained", [True, False])
def test_a_lineage_is_read_once_for_all_that_need_it(root, reads, as_trained):
    resolved = resolve_model(of(root, as_trained=as_trained))
    check_model(resolved), load_tokenizer(resolved), identities(resolved)
    assert reads == [str(root)]
    assert resolved.lineage.root == resolved.path == str(root)


def test_nothing_is_read_before_it_is_needed(reads):
    resolved = resolve_model(of("nowhere/at/all"))
    assert str(resolved.load_kwargs["dtype"]) == "auto" and reads == []
    with pytest.raises(InputError, match="There is no folder 'nowhere/at/all'"):
        check_model(resolved)


def test_what_a_check_writes_into_the_architecture_is_not_seen_by_the_next(root):
    resolved = resolve_model(of(root, use_lora=True, lora_config=tiny.LORA))
    before = vars(resolved.architecture).copy()
    check_model(resolved)
    assert vars(resolved.architecture) == before


def test_what_is_resolved_already_stays_as_it_is(root):
    resolved = resolve_model(of(root))
    assert resolve_model(resolved) is resolved
    assert resolved == ResolvedModel(model_section(of(root)))


def test_the_path_is_no_keyword_argument_of_loading(root):
    resolved = resolve_model(of(root, quantisation="nf4"))
    assert "pretrained_model_name_or_path" not in resolved.load_kwargs
    assert resolved.load_kwargs["quantization_config"]["load_in_4bit"]
    assert not resolved.trusts_code
