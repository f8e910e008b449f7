"""Adapters as other programs write them: read as peft reads them, or refused in a sentence."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftType
from plain_adapters import (
    SETTINGS,
    WEIGHTS,
    edit,
    make_adapter,
    make_root,
    plain_answers,
    retensor,
)
from safetensors.torch import load_file
from tiny import LORA, llama
from transformers import GPT2Config, GPT2LMHeadModel

from unlora.errors import InputError
from unlora.model.adapter import (
    BESIDE_LORA,
    MEANING,
    UNREADABLE,
    WITHOUT_EFFECT,
    settings_hash,
    settings_hash_before,
)
from unlora.model.attach import check_links, load_model
from unlora.model.lineage import Lineage
from unlora.model.load import root_config

PART = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    make_root(folder / "root")
    make_adapter(str(folder / "root"), folder / "ad")
    return folder


@pytest.fixture
def adapter(saved, tmp_path, monkeypatch):
    """A copy of the adapter to be spoiled, beside its root."""
    shutil.copytree(saved / "ad", tmp_path / "ad")
    monkeypatch.setenv("UNLORA_MODELS", str(saved))
    return tmp_path / "ad"


def check(folder, base=None) -> None:
    """What every command does before it reads weights."""
    lineage = Lineage.read(str(folder), base)
    check_links(lineage, root_config(lineage, {}))


def one_sentence(folder, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as refused:
        check(folder)
    said = str(refused.value)
    assert "\n" not in said and len(said) < 600 and said[-1] in ".)", said


VALUES = {
    "bias": "lora_only", "lora_bias": True, "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1, 2], "alora_invocation_tokens": [5], "arrow_config": {"top_k": 2},
    "ensure_weight_tying": True, "kasa_config": {"beta": 1e-4}, "megatron_config": {"a": 1},
    "layer_replication": [[0, 2], [1, 2]], "monteclora_config": {"num_samples": 2},
    "use_bdlora": {"target_modules_bd_a": ["q_proj"]}, "use_qalora": True,
    "velora_config": {"num_groups": 4},
}  # fmt: skip


def test_every_setting_of_peft_is_known():
    fields = set(LoraConfig.__dataclass_fields__)
    assert fields <= {*MEANING, *WITHOUT_EFFECT, *BESIDE_LORA, *UNREADABLE}
    assert set(VALUES) == {*BESIDE_LORA, *UNREADABLE}


@pytest.mark.parametrize("key", VALUES)
def test_more_than_lora_is_refused_by_name(adapter, key):
    edit(adapter, **{key: VALUES[key]})
    way = "unlora export .* --merged" if key in BESIDE_LORA else "give the merged model"
    one_sentence(adapter, f"has {key}=.*{way}")


@pytest.mark.parametrize("kind", sorted({kind.value for kind in PeftType} - {"LORA"}))
def test_other_kinds_of_adapters_are_refused_by_name(adapter, kind):
    edit(adapter, peft_type=kind)
    one_sentence(adapter, f"peft_type '{kind}'; only LORA can be read")


REFUSED_SETTINGS = {
    "no kind": ({"peft_type": None}, "peft_type None; only LORA"),
    "a classifier": ({"task_type": "SEQ_CLS"}, "task 'SEQ_CLS'; only CAUSAL_LM"),
    "a translator": ({"task_type": "SEQ_2_SEQ_LM"}, "only CAUSAL_LM"),
    "a setting of tomorrow": ({"use_new_lora": True}, "has use_new_lora=true, .*not known"),
    "merged GPT-2 of old": ({"enable_lora": [True, False]}, "enable_lora=.*not known"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "pissa.*changed.*unlora export .* --merged"),
    "PiSSA by chance": ({"init_lora_weights": "pissa_niter_4"}, "cannot be computed again"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights=.olora"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "cannot be computed again"),
    "CorDA": ({"init_lora_weights": "corda"}, "cannot be computed again"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "cannot be computed again"),
    "rank zero": ({"r": 0}, "says r=0; it must be a whole number above 0"),
    "negative rank": ({"r": -4}, "says r=-4"),
    "rank as text": ({"r": "4"}, 'says r="4"'),
    "no rank": ({"r": ...}, "says r=null"),
    "half a rank": ({"r": 4.5}, "says r=4.5"),
    "rank true": ({"r": True}, "says r=true"),
    "another rank": ({"r": 8}, "have rank 4, but adapter_config.json .* says r=8"),
    "scale as text": ({"lora_alpha": "x"}, "does not fit the model"),
    "targets that are a number": ({"target_modules": 5}, "does not fit|target_modules"),
    "a regular expression that is none": ({"target_modules": "(q_proj"}, "does not fit"),
    "a list of patterns": ({"rank_pattern": ["q_proj"]}, "ad.*(does not fit|adapter_config.json)"),
    "a pattern as text": ({"alpha_pattern": {"q_proj": "8"}}, "does not fit"),
    "a pattern that is no regular expression": ({"alpha_pattern": {"(q": 8}}, "does not fit"),
    "keys that overlap": (
        {"alpha_pattern": {"q_proj": 8, "layers.0.self_attn.q_proj": 64}},
        "alpha_pattern has .* both for model.layers.0.self_attn.q_proj"),
    "ranks that overlap": (
        {"rank_pattern": {"q_proj": 4, "self_attn.q_proj": 2}}, "rank_pattern has|does not fit"),
    "shorter targets than the file": ({"target_modules": ["q_proj"]}, "10 of its tensors find no"),
    "longer targets than the file": ({"target_modules": [*LORA["target_modules"], "up_proj"]},
                                     "lacks weights of modules.*up_proj"),
    "other targets": ({"target_modules": ["nothing"]}, "does not fit"),
    "one layer only": ({"layers_to_transform": [0]}, "find no place"),
    "a layer that is not there": ({"layers_to_transform": [9]}, "find no place|does not fit"),
    "targets left out": ({"exclude_modules": ["v_proj"]}, "4 of its tensors find no place"),
    "everything left out": ({"exclude_modules": ".*"}, "does not fit"),
    "DoRA without its magnitudes": ({"use_dora": True}, "lacks weights.*magnitude"),
    "no base": ({"base_model_name_or_path": None}, "names no base model.*model.base=FOLDER"),
    "a base that is gone": (
        {"base_model_name_or_path": "/home/anna/base-1b"},
        "belongs on '/home/anna/base-1b'.*adapter_config.json.*model.base=FOLDER.*--base"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_SETTINGS)
def test_settings_that_do_not_go_with_the_weights_are_one_sentence(adapter, name):
    changed, expected = REFUSED_SETTINGS[name]
    edit(adapter, **changed)
    one_sentence(adapter, expected)


def with_more(name, shape=(4, 32)):
    return lambda tensors: tensors | {name: torch.zeros(shape)}


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): t for name, t in tensors.items()}


REFUSED_TENSORS = {
    "a layer more than the model": (
        with_more(PART.replace("layers.0", "layers.7") + ".lora_A.weight"), "1 of its tensors"),
    "magnitudes of DoRA without its flag": (
        with_more(f"{PART}.lora_magnitude_vector", (32,)), "It was trained with use_dora=true"),
    "a bias of a layer": (with_more(f"{PART}.bias", (32,)), "find no place"),
    "another norm": (with_more("base_model.model.model.norm.weight", (32,)), "a model.norm.weight"),
    "a head of its own": (
        with_more("base_model.model.lm_head.base_layer.weight", (300, 32)), "a lm_head.weight"),
    "rows of new tokens": (
        with_more("base_model.model.model.embed_tokens.weight", (302, 32)),
        r"embed_tokens.weight of its own, \(302, 32\).*unlora export .* --merged"),
    "one half of a layer": (
        lambda t: {k: v for k, v in t.items() if k != f"{PART}.lora_B.weight"}, "lacks weights"),
    "a layer less": (
        lambda t: {k: v for k, v in t.items() if "layers.1" not in k}, "lacks weights of modules"),
    "no prefix of peft": (renamed("base_model.model.", ""), "find no place"),
    "modules of another model": (renamed("layers", "h"), "12 of its tensors find no"),
    "a prefix of data parallel": (
        renamed("base_model.", "module.base_model."), "none .* in a llama, module.base_model"),
    "two adapters in one file": (
        lambda t: {k.replace(".weight", f".{n}.weight"): v.clone() for k, v in t.items()
                   for n in ("one", "two")}, "holds several adapters: one, two"),
    "no LoRA": (lambda t: {"lm_head.weight": torch.zeros(2, 2)}, "holds no LoRA weights"),
    "other inputs": (
        lambda t: t | {f"{PART}.lora_A.weight": torch.zeros(4, 64)}, "64 inputs at .*model 32"),
    "other outputs": (
        lambda t: t | {f"{PART}.lora_B.weight": torch.zeros(64, 4)}, "64 outputs at .*model 32"),
    "another rank in one place": (
        lambda t: t | {f"{PART}.lora_A.weight": torch.zeros(2, 32)}, "rank 2.*says r=4"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_TENSORS)
def test_tensors_that_fit_nowhere_are_one_sentence(adapter, name):
    change, expected = REFUSED_TENSORS[name]
    retensor(adapter, change)
    if name in ("another norm", "a head of its own"):  # the weights below must be seen
        with pytest.raises(InputError, match=expected):
            load_model(Lineage.read(str(adapter)), {})
    else:
        one_sentence(adapter, expected)


READ = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 64}},
    "everything linear": {"target_modules": "all-linear"},
    "a regular expression": {"target_modules": r".*layers\.1\..*(q|down)_proj"},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "a layer left out": {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0\..*"},
    "on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "another start": {"init_lora_weights": "gaussian"},
    "an orthogonal start": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("name", READ)
def test_an_adapter_answers_as_plain_peft_has_it(saved, tmp_path, monkeypatch, name):
    root = str(saved / "root")
    monkeypatch.setenv("UNLORA_MODELS", str(saved))
    folder = make_adapter(root, tmp_path / "ad", **READ[name])
    model, _ = load_model(Lineage.read(str(folder)), {})
    ids = torch.arange(40)[None] * 7
    with torch.no_grad():
        ours = model(input_ids=ids).logits
        assert (ours - llama()(input_ids=ids).logits).abs().max() > 0.05
    assert (ours - plain_answers(root, folder, ids)).abs().max() < 1e-5


def test_the_name_of_the_adapter_may_stand_in_the_names_of_its_tensors(adapter, saved):
    root, ids = str(saved / "root"), torch.arange(40)[None] * 7
    expected = plain_answers(root, adapter, ids)
    retensor(adapter, renamed(".weight", ".default.weight"))
    model, _ = load_model(Lineage.read(str(adapter)), {})
    with torch.no_grad():
        assert (model(input_ids=ids).logits - expected).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_copy_of_the_head_beside_the_adapter_is_no_head_of_its_own(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("UNLORA_MODELS", str(saved))
    root = str(saved / "root")
    folder = make_adapter(root, tmp_path / "ad", save={"save_embedding_layers": "auto"})
    assert any("base_layer" in name for name in load_file(folder / WEIGHTS))
    load_model(Lineage.read(str(folder)), {})
    retensor(folder, lambda t: {k: v + 0.1 * ("base_layer" in k) for k, v in t.items()})
    with pytest.raises(InputError, match=r"brings a lm_head.weight of its own.*--merged"):
        load_model(Lineage.read(str(folder)), {})


def test_settings_without_effect_may_be_anything(adapter):
    edit(adapter, peft_version="9.9", inference_mode=False, auto_mapping={"unsloth_fixed": True},
         merge_weights=False, eva_config=None, lora_dropout=0.5, layers_pattern=None,
         revision=None, megatron_core="megatron.core", loftq_config={})  # fmt: skip
    check(adapter)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_an_adapter_of_gpt2_is_read(tmp_path):
    shape = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    root = make_root(tmp_path / "root", GPT2LMHeadModel(GPT2Config(**shape)))
    folder = make_adapter(root, tmp_path / "ad", target_modules=["c_attn", "c_proj"])
    model, _ = load_model(Lineage.read(str(folder)), {})
    ids = torch.arange(40)[None] * 7
    with torch.no_grad():
        assert (model(input_ids=ids).logits - plain_answers(root, folder, ids)).abs().max() < 1e-5


def test_a_base_that_is_gone_can_be_given(adapter, saved):
    edit(adapter, base_model_name_or_path="/home/anna/base-1b")
    check(adapter, base=str(saved / "root"))
    with pytest.raises(InputError, match="no folder of an adapter"):
        Lineage.read(str(saved / "root"), str(saved / "root"))


def test_a_folder_of_checkpoints_or_of_several_adapters_names_them(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("UNLORA_MODELS", str(saved))
    for name in ("checkpoint-10", "checkpoint-20"):
        shutil.copytree(saved / "ad", tmp_path / "out" / name)
    with pytest.raises(InputError, match="Give one of .*checkpoint-10'.*checkpoint-20'"):
        Lineage.read(str(tmp_path / "out"))
    check(tmp_path / "out" / "checkpoint-10")


def test_the_revision_that_an_adapter_names_is_the_one_its_base_is_read_at(adapter):
    edit(adapter, base_model_name_or_path="someone/model", revision="abc")
    assert Lineage.read(str(adapter)).fingerprint == "abc"
    edit(adapter, revision=None)
    assert Lineage.read(str(adapter)).fingerprint is None


CHANGES = {
    "alpha_pattern": {"q_proj": 1}, "exclude_modules": ["up_proj"], "fan_in_fan_out": True,
    "layers_pattern": "layers", "layers_to_transform": [0], "lora_alpha": 1, "r": 5,
    "peft_type": "ADALORA", "rank_pattern": {"q_proj": 1}, "target_modules": ["up_proj"],
    "target_parameters": ["w"], "use_dora": True, "use_rslora": True, **VALUES,
}  # fmt: skip


def test_the_hash_covers_every_setting_that_can_change_the_answers(saved):
    settings = json.loads((saved / "ad" / SETTINGS).read_text())
    assert set(CHANGES) == {*MEANING, *BESIDE_LORA, *UNREADABLE}
    hashes = {settings_hash(settings | {key: value}) for key, value in CHANGES.items()}
    assert len(hashes) == len(CHANGES) and settings_hash(settings) not in hashes
    for key in WITHOUT_EFFECT:
        assert settings_hash(settings | {key: "other"}) == settings_hash(settings)
    assert settings_hash(settings | {"a setting of tomorrow": True}) != settings_hash(settings)
    shuffled = settings | {"target_modules": settings["target_modules"][::-1]}
    assert settings_hash(shuffled) == settings_hash(settings)


def test_a_lineage_written_before_all_settings_were_hashed_is_still_read(adapter, saved):
    lineage = Lineage.read(str(adapter))
    shutil.copytree(adapter, adapter.parent / "run")
    lineage.__class__(lineage.root).write(adapter.parent / "run")
    file = adapter.parent / "run" / "lineage.json"
    content = json.loads(file.read_text())
    settings = json.loads((adapter / SETTINGS).read_text())
    content["links"][0]["config_sha256"] = settings_hash_before(settings)
    file.write_text(json.dumps(content))
    assert Lineage.read(str(file.parent)).links[0].config_sha256 == settings_hash(settings)
    edit(file.parent, lora_alpha=1)
    with pytest.raises(InputError, match="sha256 has changed"):
        Lineage.read(str(file.parent))
