"""Models with experts, whose weights are one tensor for all of them, and models with vision."""

import pytest
import torch
from peft import PeftModel
from plain_adapters import make_root
from tiny import SHAPE, tokenizer
from transformers import AutoModelForCausalLM, Gemma3Config, MixtralConfig, Qwen3MoeConfig

from unlora.errors import InputError
from unlora.model import get_model
from unlora.model.guards import gradient_faults, saved_equals_trained, start_equals_target
from unlora.model.lora import LoRAModelForCausalLM, save_adapter
from unlora.model.probe import Probe
from unlora.model.standalone import export
from unlora.model.targets import adapted_places, checked_lora_config

MIXTRAL = MixtralConfig(**SHAPE, num_local_experts=4)
QWEN3 = Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
                       head_dim=8)  # fmt: skip
GEMMA3 = Gemma3Config(
    text_config={**SHAPE, "head_dim": 8, "sliding_window": 32},
    vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                   "num_attention_heads": 4, "image_size": 28, "patch_size": 14},
    mm_tokens_per_image=4,
)  # fmt: skip
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}


def model_of(architecture):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(architecture)


def fused(architecture):
    """Whether the experts are one tensor in this version of transformers."""
    return any(
        name.endswith("experts.down_proj") for name, _ in model_of(architecture).named_parameters()
    )


def disturb(model):
    generator = torch.Generator().manual_seed(7)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


def run_folder(folder, model):
    folder.mkdir()
    save_adapter(model, folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern")  # of plain peft
@pytest.mark.parametrize(
    "architecture",
    [QWEN3, *(pytest.param(other, marks=pytest.mark.slow) for other in (MIXTRAL, GEMMA3))],
    ids=lambda a: a.model_type,
)
def test_everything_linear_goes_the_whole_way(tmp_path, architecture):
    """Train, save, read back, go on in every way, export both ways, reload with plain libraries."""
    root = make_root(tmp_path / "root", model_of(architecture))
    model = disturb(LoRAModelForCausalLM.from_pretrained(root, LORA))
    said = Probe.take(model)
    first = run_folder(tmp_path / "first", model)
    assert "0.00e+00" in saved_equals_trained(model, first)
    for mode in ("merge", "stack", "continue"):
        further = LoRAModelForCausalLM.from_pretrained(str(first), LORA, lineage=mode)
        assert said.difference(further)[1] < 1e-4
        start_equals_target(further, further.target)
    second = run_folder(tmp_path / "second", disturb(further))
    said = Probe.take(further)
    asked, _ = get_model({"model_args": {"pretrained_model_name_or_path": str(second)}},
                         trainable=False)  # fmt: skip
    assert said.difference(asked)[1] < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(export(str(second), "merged"))
    plain = AutoModelForCausalLM.from_pretrained(root)
    adapted = PeftModel.from_pretrained(plain, export(str(second), "adapter"))
    assert said.difference(merged)[1] < 1e-4 and said.difference(adapted)[1] < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern")
def test_adapters_on_experts_are_joined_into_one(tmp_path):
    root = make_root(tmp_path / "root", model_of(MIXTRAL))
    first = run_folder(
        tmp_path / "first", disturb(LoRAModelForCausalLM.from_pretrained(root, LORA))
    )
    model = disturb(LoRAModelForCausalLM.from_pretrained(str(first), LORA))
    second = run_folder(tmp_path / "second", model)
    plain = AutoModelForCausalLM.from_pretrained(root)
    joined = PeftModel.from_pretrained(plain, export(str(second), "adapter"))
    assert Probe.take(model).difference(joined)[1] < 1e-4


@pytest.mark.skipif(not fused(MIXTRAL), reason="experts are modules in this transformers")
def test_experts_have_no_dropout_and_several_adapters_are_on_the_same_ones(tmp_path):
    with pytest.raises(
        InputError, match="lora_dropout is 0.05.*Set model.lora_config.lora_dropout=0"
    ):
        checked_lora_config(LORA | {"lora_dropout": 0.05}, MIXTRAL)
    only = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    config = checked_lora_config(LORA | only, MIXTRAL)
    assert config.target_parameters
    root = make_root(tmp_path / "root", model_of(MIXTRAL))
    first = run_folder(tmp_path / "first", LoRAModelForCausalLM.from_pretrained(root, LORA | only))
    with pytest.raises(InputError, match="on the parameters.*unlora export --merged"):
        LoRAModelForCausalLM.from_pretrained(str(first), LORA)
    LoRAModelForCausalLM.from_pretrained(str(first), LORA | {"target_modules": ["q_proj"]})


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", r".*\.q_proj"], ids=str)
def test_of_a_model_with_vision_the_text_part_is_adapted(tmp_path, targets):
    root = make_root(tmp_path / "root", model_of(GEMMA3))
    linear = {name for name, m in model_of(GEMMA3).named_modules() if name.endswith("q_proj")}
    assert any("vision_tower" in name for name in linear), "there is something to leave out"
    given = LORA | {"target_modules": targets, "exclude_modules": ["layers.0.self_attn.v_proj"]}
    model = LoRAModelForCausalLM.from_pretrained(root, given)
    places = adapted_places(model, "default")
    assert places and all("language_model" in place for place in places)
    assert not any(place.endswith("layers.0.self_attn.v_proj") for place in places)
    model.train()(input_ids=torch.arange(8)[None], token_type_ids=torch.zeros(1, 8, dtype=int))


def test_an_expert_to_which_no_token_was_sent_is_no_dead_adapter():
    part = "layers.0.block_sparse_moe.experts.3.w1.lora_B"
    model = torch.nn.Module()
    inner = model
    for name in part.split("."):
        inner.add_module(name, torch.nn.Module())
        inner = getattr(inner, name)
    inner.weight = torch.nn.Parameter(torch.zeros(2))
    assert gradient_faults(model) == []
    model.lora_B = torch.nn.Parameter(torch.zeros(2))
    assert gradient_faults(model) == ["lora_B: no gradient"]
