"""What a model allows is found by trying; what it does not allow is not done."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import LORA, llama, qwen2
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    Lfm2Config,
    MambaConfig,
    MistralConfig,
    OpenAIGPTConfig,
)

from unlora.forward import capabilities
from unlora.forward.capabilities import found_way
from unlora.forward.forward_pass import Way

CPU = torch.device("cpu")
SMALL = {"vocab_size": 64, "num_hidden_layers": 2}


def of(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.default_cases(3)
@pytest.mark.parametrize("make", [llama, qwen2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [False, True])
def test_common_models_allow_all(make, dtype, lora):
    model = make()
    if lora:
        model = get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False))
    model.to(dtype).train()
    state = torch.random.get_rng_state()
    assert found_way(model, CPU) == Way(packs=True, chunks=True, flat=True)
    assert model.training and torch.equal(torch.random.get_rng_state(), state)


def test_logits_that_are_capped_are_not_a_product():
    gemma = Gemma2Config(
        **SMALL, hidden_size=32, intermediate_size=64, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, final_logit_softcapping=30.0,
    )  # fmt: skip
    assert not found_way(of(gemma), CPU).chunks


def test_a_recurrent_model_runs_row_by_row():
    assert not found_way(of(MambaConfig(**SMALL, hidden_size=32, state_size=4)), CPU).packs


@pytest.mark.parametrize("window", [4, None])
def test_a_model_that_does_not_attend_to_the_whole_row_is_not_attended_to_by_rows(window):
    config = MistralConfig(
        **SMALL, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=window,
    )  # fmt: skip
    assert found_way(of(config), CPU) == Way(packs=True, chunks=True, flat=window is None)


def test_a_model_that_counts_its_positions_itself():
    assert found_way(of(GPT2Config(vocab_size=64, n_layer=2, n_embd=32, n_head=2)), CPU).chunks


def test_a_head_with_a_bias_is_asked_whole():
    model = llama()
    model.lm_head = nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=True)
    assert not found_way(model, CPU).chunks


@pytest.mark.parametrize("seed", range(5))
def test_coarse_numbers_hide_no_row_before(seed):
    """Short convolutions see a little of the row before: less than bfloat16 rounds off."""
    torch.manual_seed(seed)
    config = Lfm2Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1, pad_token_id=0,
        layer_types=["conv"] + ["full_attention"] * 3, conv_L_cache=3,
    )  # fmt: skip
    assert not found_way(AutoModelForCausalLM.from_config(config).bfloat16(), CPU).packs


@pytest.mark.parametrize("seed", range(3))
def test_a_model_that_passes_over_positions_in_coarse_numbers(seed):
    torch.manual_seed(seed)
    config = OpenAIGPTConfig(vocab_size=64, n_layer=2, n_embd=32, n_head=2, initializer_range=0.3)
    assert not found_way(AutoModelForCausalLM.from_config(config).bfloat16(), CPU).packs


def test_a_head_that_cannot_be_asked_in_chunks_is_asked_whole(monkeypatch):
    def elsewhere(*_args):
        raise RuntimeError("Expected all tensors to be on the same device")

    monkeypatch.setattr(capabilities, "factors", elsewhere)
    assert found_way(llama(), CPU) == Way(packs=True, chunks=False, flat=True)


def test_what_is_not_a_number_agrees_with_nothing():
    logps, model = torch.tensor([-1.0, -2.0]), llama()
    assert capabilities._agree(logps, logps.clone(), model)
    assert not capabilities._agree(logps, torch.tensor([torch.nan, -2.0]), model)
