"""The name of a model changes with all that its answers depend on, and with nothing else."""

import json
import shutil

import pytest
import tiny
from safetensors.torch import load_file, save_file

from unlora.config.schema import ModelSection
from unlora.errors import InputError
from unlora.model import fingerprints, get_model, resolve_model
from unlora.model.lineage import Link
from unlora.model.lora import save_adapter


def section(path, **model_args):
    args = {"pretrained_model_name_or_path": str(path), "torch_dtype": "float32"} | model_args
    return ModelSection(model_args=args, lora_config={})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A root model, and a run folder with an adapter on it."""
    folder = tmp_path_factory.mktemp("identity")
    tiny.llama().save_pretrained(folder / "root")
    tiny.tokenizer().save_pretrained(folder / "root")
    asked = {"model_args": {"pretrained_model_name_or_path": str(folder / "root")},
             "use_lora": True, "lora_config": {"r": 2, "target_modules": ["q_proj"]}}  # fmt: skip
    model, tokenizer = get_model(asked)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.fill_(0.1)
    save_adapter(model, folder / "run")
    tokenizer.save_pretrained(folder / "run")
    return folder


def identities(model):
    return fingerprints.identities(resolve_model(model))


@pytest.fixture
def models(saved, tmp_path):
    """A copy of them; paths of a lineage are relative, so it can be moved as a whole."""
    shutil.copytree(saved, tmp_path / "models")
    return tmp_path / "models"


def change(file, name_part):
    weights = load_file(file)
    name = next(name for name in weights if name_part in name)
    weights[name] = weights[name] + 1e-3
    save_file(weights, file, metadata={"format": "pt"})


def test_the_same_model_has_the_same_name_wherever_it_is(saved, models):
    key, root = identities(section(saved / "run"))
    assert identities(section(saved / "run")) == (key, root) and key != root
    assert identities(section(models / "run")) == (key, root)
    # without an adapter a model is its own root
    alone = identities(section(saved / "root"))
    assert alone == (root, root)


def test_how_weights_come_into_memory_does_not_matter(saved):
    expected = identities(section(saved / "run"))
    assert identities(section(saved / "run", device_map="auto")) == expected
    assert identities(section(saved / "run", low_cpu_mem_usage=True)) == expected
    assert identities(section(saved / "run", torch_dtype="fp32")) == expected


def test_another_dtype_or_attention_is_another_model(saved):
    names = [
        identities(section(saved / "run", **changed))
        for changed in ({}, {"torch_dtype": "bfloat16"}, {"attn_implementation": "eager"},
                        {"torch_dtype": "auto"})
    ]  # fmt: skip
    assert len({key for key, _ in names}) == len({root for _, root in names}) == 4


def test_another_root_changes_both_names(models):
    before = identities(section(models / "root"))
    change(models / "root" / "model.safetensors", "embed")
    after = identities(section(models / "root"))
    assert before[0] != after[0] and before[1] != after[1]


def sign(folder):
    """Write the lineage of an adapter as it is now, as training it again does."""
    file, link = folder / "lineage.json", Link.of(folder)
    written = json.loads(file.read_text())
    written["links"][-1] |= {"sha256": link.sha256, "config_sha256": link.config_sha256}
    file.write_text(json.dumps(written))


def test_another_adapter_changes_one_name(models):
    key, root = identities(section(models / "run"))
    change(models / "run" / "adapter_model.safetensors", "lora_B")
    with pytest.raises(InputError, match="not the one the lineage names"):
        identities(section(models / "run"))
    sign(models / "run")
    other, same_root = identities(section(models / "run"))
    assert other != key and same_root == root


def test_the_scale_of_an_adapter_is_part_of_it(models):
    key, root = identities(section(models / "run"))
    config = models / "run" / "adapter_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"lora_alpha": 2 * content["lora_alpha"]}))
    sign(models / "run")
    other, same_root = identities(section(models / "run"))
    assert other != key and same_root == root


COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture
def hub(saved, tmp_path):
    """A local cache of the hub with two commits of one repository."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    for commit in COMMITS:
        shutil.copytree(saved / "root", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMITS[0])
    return tmp_path / "hub"


def test_a_model_of_the_hub_is_told_by_its_commit(hub):
    first = identities(section("someone/tiny", cache_dir=str(hub)))
    pinned = identities(section("someone/tiny", cache_dir=str(hub), revision=COMMITS[0]))
    other = identities(section("someone/tiny", cache_dir=str(hub), revision=COMMITS[1]))
    assert first == pinned != other and None not in (*first, *other)
    (hub / "models--someone--tiny" / "refs" / "main").write_text(COMMITS[1])
    assert identities(section("someone/tiny", cache_dir=str(hub))) == other


def test_other_packages_may_answer_otherwise(saved, monkeypatch):
    before = identities(section(saved / "run"))
    monkeypatch.setattr("unlora.model.fingerprints.metadata.version", lambda package: "0")
    assert identities(section(saved / "run")) != before


def test_a_name_needs_no_weights_in_memory(saved, monkeypatch):
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("loaded")
    )
    assert all(identities(section(saved / "run")))
