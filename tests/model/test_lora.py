import copy
import hashlib
import json
import os

import pytest
import torch
from omegaconf import OmegaConf
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import LORA, llama, qwen2, tokenizer
from transformers import AutoModelForCausalLM
from transformers.integrations import deepspeed

from unlora.errors import GuardError, InputError
from unlora.model import get_model
from unlora.model.guards import start_equals_target
from unlora.model.lineage import Lineage
from unlora.model.load import _device_map
from unlora.model.lora import LoRAModelForCausalLM, save_adapter
from unlora.model.probe import Probe
from unlora.model.reference import as_reference
from unlora.model.standalone import export


def disturb(model):
    """Stands for training: the policy's adapter gets weights that matter."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert ".default." in name
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def run_folder(tmp_path, name, model):
    folder = tmp_path / name
    folder.mkdir()
    save_adapter(model, folder)
    tokenizer().save_pretrained(folder)
    return folder


ROOTS = [
    ("llama", llama, True),
    ("llama-untied", llama, False),
    pytest.param(("qwen2", qwen2, True), marks=pytest.mark.slow),
]


@pytest.fixture(params=ROOTS, ids=["llama", "llama-untied", "qwen2"])
def root(request, tmp_path):
    _, make, tied = request.param
    make(tied=tied).save_pretrained(tmp_path / "root")
    tokenizer().save_pretrained(tmp_path / "root")
    return str(tmp_path / "root")


@pytest.fixture
def finetuned(root, tmp_path):
    """A run folder whose adapter changes the root's answers, and what that model says."""
    model = disturb(LoRAModelForCausalLM.from_pretrained(root, LORA))
    said = Probe.take(model)
    assert said.difference(AutoModelForCausalLM.from_pretrained(root))[0] > 0.5
    return run_folder(tmp_path, "finetuned", model), said


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("mode", ["auto", "merge", "stack", "continue"])
def test_unlearning_starts_at_the_finetuned_model(finetuned, mode):
    folder, said = finetuned
    model = LoRAModelForCausalLM.from_pretrained(str(folder), LORA, lineage=mode)
    # float32 rounding of a merge; logits are a few units large
    assert said.difference(model)[0] < 1e-4
    start_equals_target(model, model.target)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable and all(".default." in name for name in trainable)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("mode", ["merge", "stack", "continue"])
def test_the_reference_is_the_lineage_without_the_last_link(finetuned, mode):
    folder, said = finetuned
    model = LoRAModelForCausalLM.from_pretrained(str(folder), LORA, lineage=mode).train()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    disturb(model)
    assert said.difference(model)[0] > 0.1
    with as_reference(model) as reference:
        assert said.difference(reference)[0] < 1e-4
    assert model.training and said.difference(model)[0] > 0.1
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("mode", ["merge", "stack", "continue"])
def test_the_gradient_of_a_policy_pass_survives_a_reference_pass(finetuned, mode):
    model = LoRAModelForCausalLM.from_pretrained(str(finetuned[0]), LORA, lineage=mode).train()
    ids = torch.arange(8)[None]
    policy = model(input_ids=ids).logits
    with as_reference(model) as reference:
        said = reference(input_ids=ids).logits
    (policy - said + 1).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("mode", ["merge", "stack", "continue"])
def test_a_chain_of_links_is_one_model_in_every_form(finetuned, tmp_path, mode, root):
    """Save, reload by lineage, export merged and as adapter, reload with plain libraries."""
    folder, _ = finetuned
    model = disturb(LoRAModelForCausalLM.from_pretrained(str(folder), LORA, lineage=mode))
    said = Probe.take(model)
    second = run_folder(tmp_path, "second", model)
    third = disturb(LoRAModelForCausalLM.from_pretrained(str(second), LORA))
    assert said.difference(third)[0] > 0.1
    third_said = Probe.take(third)
    third_folder = run_folder(tmp_path, "third", third)
    for run, probe in ((second, said), (third_folder, third_said)):
        asked, _ = get_model(
            {"model_args": {"pretrained_model_name_or_path": str(run)}}, trainable=False
        )
        assert probe.difference(asked)[0] < 1e-4
        merged = AutoModelForCausalLM.from_pretrained(export(str(run), "merged"))
        assert probe.difference(merged)[0] < 1e-4
        adapter = export(str(run), "adapter")
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root), adapter)
        assert probe.difference(plain)[0] < 1e-4


def test_the_saved_adapter_holds_lora_tensors_only(finetuned, root):
    from safetensors import safe_open

    folder, said = finetuned
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        keys = file.keys()
    assert keys and all("lora_" in key for key in keys)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root), folder)
    assert said.difference(plain)[0] < 1e-5


def test_a_changed_link_is_named(finetuned):
    folder, _ = finetuned
    weights = folder / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match="finetuned.*sha256 has changed"):
        Lineage.read(str(folder))


def test_a_changed_setting_of_a_link_is_named(finetuned):
    folder, _ = finetuned
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 1}))
    with pytest.raises(InputError, match="adapter_config.json is not the one.*has changed"):
        Lineage.read(str(folder))


@pytest.mark.default_cases(1)
def test_a_missing_link_is_named(finetuned, tmp_path):
    folder, _ = finetuned
    model = LoRAModelForCausalLM.from_pretrained(str(folder), LORA)
    second = run_folder(tmp_path, "second", model)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="finetuned.*not there"):
        Lineage.read(str(second))


def test_a_changed_root_is_named(finetuned, root):
    qwen2(hidden_size=64).save_pretrained(root)
    with pytest.raises(InputError, match="root model .* has changed"):
        Lineage.read(str(finetuned[0]))


def test_any_change_of_the_root_is_seen(finetuned, root, tmp_path):
    weights = tmp_path / "root" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match="root model .* has changed"):
        Lineage.read(str(finetuned[0]))


def test_a_root_that_is_gone_is_never_looked_for_on_the_hub(finetuned, root, tmp_path):
    os.rename(root, tmp_path / "gone")
    with pytest.raises(InputError, match="root model of .* is not there"):
        Lineage.read(str(finetuned[0]))


@pytest.mark.default_cases(1)
def test_a_run_folder_may_move_away_from_its_root(finetuned, root, tmp_path):
    folder, said = finetuned
    (tmp_path / "a" / "b").mkdir(parents=True)
    moved = tmp_path / "a" / "b" / "moved"
    os.rename(folder, moved)
    model = LoRAModelForCausalLM.from_pretrained(str(moved), LORA)
    assert said.difference(model)[0] < 1e-4


def test_an_adapter_that_names_itself_as_its_base_is_refused(finetuned):
    folder, _ = finetuned
    (folder / "lineage.json").unlink()
    file = folder / "adapter_config.json"
    named = {**json.loads(file.read_text()), "base_model_name_or_path": str(folder)}
    file.write_text(json.dumps(named))
    with pytest.raises(InputError, match="names itself"):
        Lineage.read(str(folder))


def test_a_wiped_adapter_is_seen_however_little_it_does():
    target = get_peft_model(llama(dtype=torch.bfloat16), LoraConfig(**LORA))
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if "lora_B" in name:
                parameter.add_(1e-4)
    said = Probe.of(target)
    assert said.difference(llama(dtype=torch.bfloat16))[1] < 1e-3, "too little to be seen by itself"
    with pytest.raises(GuardError, match="another model"):
        start_equals_target(llama(dtype=torch.bfloat16), said)
    assert start_equals_target(target, said)


@pytest.mark.default_cases(1)
def test_saves_can_be_moved_as_a_whole(finetuned, tmp_path):
    _folder, said = finetuned
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("root", "finetuned"):
        os.rename(tmp_path / name, moved / name)
    model = LoRAModelForCausalLM.from_pretrained(str(moved / "finetuned"), LORA)
    assert said.difference(model)[0] < 1e-4


def test_get_model_sees_use_lora_and_leaves_the_config_alone(root):
    config = {
        "model_args": {"pretrained_model_name_or_path": root, "torch_dtype": "float32",
                       "device_map": "auto"},
        "tokenizer_args": {"pretrained_model_name_or_path": root},
        "use_lora": True,
        "lora_config": dict(LORA),
    }  # fmt: skip
    before = copy.deepcopy(config)
    model, tok = get_model(config)
    assert config == before
    assert isinstance(model, PeftModel) and tok.pad_token_id is not None
    plain, _ = get_model({**config, "use_lora": False})
    assert not isinstance(plain, PeftModel)
    assert all(p.requires_grad for p in plain.parameters())


@pytest.mark.default_cases(2)
@pytest.mark.parametrize(
    "targets", [["q_proj"], "all-linear", r".*layers\.0\..*(q|v)_proj", ["layers.1.mlp.up_proj"]]
)
def test_target_modules_may_be_a_list_a_regex_or_all_linear(root, targets):
    model = LoRAModelForCausalLM.from_pretrained(root, {**LORA, "target_modules": targets})
    assert sum(p.requires_grad for p in model.parameters()) >= 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"target_modules": ["q_prj"]}, "Did you mean 'q_proj'"),
        ({"target_modules": ["q_proj", "c_attn"]}, "Unknown target module of"),
        ({"target_modules": ".*attention.*"}, "matches no linear layer"),
        ({"target_modules": "(["}, "not a regular expression"),
        ({"rank": 4}, "Unknown key of model.lora_config 'rank'"),
        ({"bias": "lora_only"}, "Set model.lora_config.bias=none"),
        ({"r": "8"}, "r is '8' .text.; it must be a whole number"),
        ({"r": 0}, "greater than 0"),
        ({"init_lora_weights": "loftq"}, "rewrites the weights below"),
        ({"modules_to_save": ["lm_head"]}, "would stay on"),
    ],
)
def test_a_wrong_adapter_is_refused_before_weights_load(root, monkeypatch, change, message):
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights loaded")
    )
    with pytest.raises(InputError, match=message):
        LoRAModelForCausalLM.from_pretrained(root, {**LORA, **change})


def test_a_model_that_is_nowhere_is_one_sentence(tmp_path):
    for path in (str(tmp_path / "none"), "./none", "nobody/no-such-model"):
        with pytest.raises(InputError, match="none|no-such-model"):
            get_model({"model_args": {"pretrained_model_name_or_path": path}})
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no model"):
        get_model({"model_args": {"pretrained_model_name_or_path": str(tmp_path / "empty")}})


def test_a_config_object_of_hydra_is_saved_like_a_dict(root, tmp_path):
    config = OmegaConf.create({"lora_config": LORA})
    model = LoRAModelForCausalLM.from_pretrained(root, config.lora_config, dtype="float32")
    folder = run_folder(tmp_path, "mine", model)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4


def test_an_unknown_dtype_names_the_near_miss(root):
    with pytest.raises(InputError, match="Unknown dtype 'flaot32'. Did you mean 'float32'"):
        LoRAModelForCausalLM.from_pretrained(root, LORA, torch_dtype="flaot32")


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("file", ["root/model.safetensors", "finetuned/adapter_model.safetensors"])
def test_damaged_weights_are_one_sentence(finetuned, tmp_path, file):
    (tmp_path / file).write_bytes(b"damaged")
    folder = tmp_path / "finetuned"
    content = json.loads((folder / "lineage.json").read_text())
    content["root"]["fingerprint"] = None
    weights = (folder / "adapter_model.safetensors").read_bytes()
    content["links"][-1]["sha256"] = hashlib.sha256(weights).hexdigest()
    (folder / "lineage.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="damaged"):
        LoRAModelForCausalLM.from_pretrained(str(folder), LORA)


def test_continuing_needs_an_adapter(root):
    with pytest.raises(InputError, match="has no adapter to continue"):
        LoRAModelForCausalLM.from_pretrained(root, LORA, lineage="continue")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    llama_small = qwen2(vocab_size=100)
    llama_small.save_pretrained(tmp_path / "small")
    tokenizer().save_pretrained(tmp_path / "small")
    with pytest.raises(InputError, match="100 embeddings. Give the tokenizer of this model"):
        get_model({"model_args": {"pretrained_model_name_or_path": str(tmp_path / "small")}})


@pytest.mark.default_cases(1)
def test_an_export_never_overwrites(finetuned):
    folder, _ = finetuned
    export(str(folder), "adapter")
    with pytest.raises(InputError, match="is not empty"):
        export(str(folder), "adapter")


def test_a_full_model_has_nothing_to_export(root):
    with pytest.raises(InputError, match="has no adapter to export"):
        export(root, "merged")


@pytest.mark.default_cases(1)
def test_the_card_says_where_the_adapter_belongs(finetuned, tmp_path):
    folder, _ = finetuned
    second = run_folder(tmp_path, "second", LoRAModelForCausalLM.from_pretrained(str(folder), LORA))
    assert "finetuned" in (second / "README.md").read_text()
    links = json.loads((second / "lineage.json").read_text())["links"]
    assert [link["path"] for link in links] == ["../finetuned", "."]


class ThirdStage:
    """What transformers looks at to split weights as it reads them."""

    config = {}

    def is_zero3(self):
        return True


def test_weights_are_read_whole_where_deepspeed_is_to_split_them(root, monkeypatch):
    """Without that reading would ask for deepspeed, which is not needed before training starts."""
    configured = ThirdStage()
    deepspeed.set_hf_deepspeed_config(configured)
    try:
        section = {"model_args": {"pretrained_model_name_or_path": str(root)}}
        with pytest.raises((ImportError, AssertionError)):
            AutoModelForCausalLM.from_pretrained(str(root))
        model, _ = get_model(section | {"use_lora": True, "lora_config": {"r": 2}})
        assert all(p.numel() for p in model.parameters())
        assert deepspeed.is_deepspeed_zero3_enabled()  # Trainer must know
    finally:
        deepspeed.unset_hf_deepspeed_config()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("given", ["cuda:0", {"": "cuda:1"}])
def test_a_gpu_that_is_not_there_is_no_cpu(given):
    with pytest.raises(InputError, match="torch sees no such GPU here. Set it to auto"):
        _device_map(given)
    assert _device_map("auto") is None
