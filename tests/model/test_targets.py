"""New adapters: what they are put on, and settings that fit nothing; no weights are read."""

import logging

import pytest
from peft import PeftModelForCausalLM
from tiny import SHAPE, llama
from transformers import (
    GPT2Config,
    LlamaConfig,
)

from unlora.errors import InputError
from unlora.model.lora import LoRAModelForCausalLM
from unlora.model.meta_model import skeleton
from unlora.model.targets import adapted_places, checked_lora_config

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}


def places(config, architecture):
    model = PeftModelForCausalLM(skeleton(architecture), config, low_cpu_mem_usage=True)
    return set(adapted_places(model, "default"))


REFUSED = {
    "a layer that is not there": ({"layers_to_transform": [99]}, "names layer 99.*from 0"),
    "one of two layers": ({"layers_to_transform": [0, 7]}, "names layer 7.*are 0 to 1"),
    "a layer below the first": ({"layers_to_transform": -1}, "names layer -1.*0 to 1"),
    "another name of layers": (
        {"layers_to_transform": [0], "layers_pattern": "h"}, "does not fit|leaves all of it out"),
    "a pattern without layers": ({"layers_pattern": "layers"}, "layers_to_transform"),
    "layers of a regular expression": (
        {"target_modules": ".*q_proj", "layers_to_transform": [0]}, "cannot be used when"),
    "everything left out": ({"exclude_modules": ".*"}, "does not fit a llama|leaves all"),
    "a target left out": ({"exclude_modules": ["q_proj"]}, "names 'q_proj'.*leaves all of it out"),
    "a head without its layer": (
        {"target_modules": ["lm_head", "q_proj"], "layers_to_transform": [99]}, "names layer 99"),
    "a typo in what is left out": ({"exclude_modules": ["q_prj"]}, "excluded module.*'q_proj'"),
    "nothing left out": ({"exclude_modules": ".*attn.nothing"}, "matches no linear layer"),
    "no regular expression left out": ({"exclude_modules": "(["}, "not a regular expression"),
    "a typo in a rank": ({"rank_pattern": {"q_prj": 2}}, "rank_pattern 'q_prj'. Did you mean"),
    "a typo in a scale": ({"alpha_pattern": {"nothing": 64}}, "alpha_pattern 'nothing'"),
    "a rank of no target": ({"rank_pattern": {"down_proj": 2}}, "rank_pattern 'down_proj'"),
    "no regular expression as rank": ({"rank_pattern": {"(q": 2}}, "not a reg|does not fit"),
    "scales that overlap": (
        {"alpha_pattern": {"q_proj": 8, "layers.0.self_attn.q_proj": 64}}, "both for .*order"),
    "ranks that overlap": (
        {"rank_pattern": {"self_attn.q_proj": 2, "q_proj": 8}}, "rank_pattern has .*both for"),
    "an odd rank and an orthogonal start": (
        {"init_lora_weights": "orthogonal", "r": 3}, "does not fit a llama"),
    "parameters that are not there": (
        {"target_parameters": ["experts.down_proj"], "lora_dropout": 0.0}, "names .experts"),
    "a typo": ({"target_modules": ["q_prj"]}, "Did you mean 'q_proj'"),
    "everything there is": (
        {"target_modules": ".*"},
        "'.*' also matches modules that are no linear layers .*LlamaRMSNorm.*=all-linear.*q_proj"),
    "whole layers": ({"target_modules": ".*layers.*"}, "no linear layers .*Give .*all-linear"),
    "an embedding": ({"target_modules": ["embed_tokens"]}, "Unknown target module"),
    "a norm": ({"target_modules": ["norm"]}, "Unknown target module"),
    "a linear layer of another model": ({"target_modules": ["c_attn"]}, "Unknown target module"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_fit_nothing_are_one_sentence(name):
    changed, expected = REFUSED[name]
    with pytest.raises(InputError, match=expected) as refused:
        checked_lora_config({**LORA, **changed}, LlamaConfig(**SHAPE))
    assert "\n" not in str(refused.value)


FITS = {
    "a list": ({}, 4),
    "everything linear": ({"target_modules": "all-linear"}, 14),
    "the head": ({"target_modules": ["lm_head"]}, 1),
    "one layer": ({"layers_to_transform": [1]}, 2),
    "one layer by number": ({"layers_to_transform": 1, "layers_pattern": "layers"}, 2),
    "one left out": ({"target_modules": "all-linear", "exclude_modules": ["up_proj"]}, 12),
    "patterns that agree": ({"alpha_pattern": {"q_proj": 8, "self_attn.q_proj": 8}}, 4),
    "PiSSA": ({"init_lora_weights": "pissa"}, 4),
    "DoRA": ({"use_dora": True}, 4),
}


@pytest.mark.default_cases(5)
@pytest.mark.parametrize("name", FITS)
def test_settings_that_fit_are_put_where_they_say(name):
    changed, count = FITS[name]
    config = checked_lora_config({**LORA, **changed}, LlamaConfig(**SHAPE))
    assert config.init_lora_weights == changed.get("init_lora_weights", True)
    config.init_lora_weights = True
    assert len(places(config, LlamaConfig(**SHAPE))) == count


def test_the_layers_of_gpt2_can_be_adapted_by_name():
    architecture = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4)
    config = checked_lora_config({**LORA, "target_modules": ["c_attn", "c_proj"]}, architecture)
    assert config.fan_in_fan_out
    assert len(places(config, architecture)) == 6


def test_a_rank_above_the_width_is_told_of(tmp_path, caplog):
    llama().save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        LoRAModelForCausalLM.from_pretrained(str(tmp_path), {**LORA, "r": 64})
    told = [r.getMessage() for r in caplog.records if "no rank above" in r.getMessage()]
    assert len(told) == 1 and "r is 64" in told[0] and "on 4 of its 4 places" in told[0]
