"""A model that is given by its path is asked as it was trained."""

import json
import logging
import shutil

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from unlora.config.resolve import model_section, shipped
from unlora.errors import InputError
from unlora.model import get_model, resolve_model

TAGS = {"apply_chat_template": False, "user_start_tag": "Q ", "asst_start_tag": " A "}
QUESTION_ANSWER = shipped("template/question-answer.yaml")


@pytest.fixture
def base(tmp_path):
    """A model folder whose tokenizer has no chat template."""
    folder = tmp_path / "base"
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    tiny.llama(dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base, tmp_path):
    """A plain adapter folder on it, without a tokenizer."""
    folder = tmp_path / "adapter"
    model = LlamaForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    return folder


def can_chat(folder):
    tiny.tokenizer().save_pretrained(folder)
    return folder


def ran(folder, **model):
    (folder / "run_config.json").write_text(json.dumps({"model": model}))
    return folder


def found(path, *, template_args=None, tokenizer_args=None, **model_args):
    return resolve_model(
        {
            "model_args": {"pretrained_model_name_or_path": str(path), **model_args},
            "template_args": template_args or {},
            "tokenizer_args": tokenizer_args or {},
            "as_trained": True,
        }
    ).section


def test_without_run_and_chat_template_it_is_question_and_answer(base, adapter, caplog):
    with caplog.at_level(logging.INFO):
        assert found(base).template_args == QUESTION_ANSWER
    assert f"{base} is asked in this template: 'Question: ... Answer: ...'" in caplog.text
    assert found(adapter).template_args == QUESTION_ANSWER


def test_the_chat_template_of_a_tokenizer_is_used(base, adapter):
    can_chat(base)
    assert found(base).template_args == {"apply_chat_template": True}
    assert found(adapter).template_args == {"apply_chat_template": True}


def test_a_run_is_asked_as_it_was_trained(base, caplog):
    args = {"torch_dtype": "float32", "attn_implementation": "x", "trust_remote_code": True}
    tokenizer_args = {"pretrained_model_name_or_path": "gone", "legacy": True, "token": "(hidden)"}
    ran(can_chat(base), template_args=TAGS, model_args=args, tokenizer_args=tokenizer_args)
    with caplog.at_level(logging.INFO):
        section = found(base)
    assert f"that of the run {base}" in caplog.text
    assert section.template_args == TAGS
    # what a folder says about remote code is not for it to say
    assert section.model_args == {
        "pretrained_model_name_or_path": str(base), "torch_dtype": "float32"
    }  # fmt: skip
    assert section.tokenizer_args == {"pretrained_model_name_or_path": str(base), "legacy": True}
    model, _ = get_model(section, trainable=False)
    assert model.dtype == torch.float32


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_of_a_run_is_not_forgotten(attention, base):
    ran(base, template_args=TAGS, model_args={"attn_implementation": attention})
    section = found(base, attn_implementation=None)  # as model=PATH composes it
    assert section.model_args["attn_implementation"] == attention
    assert found(base, attn_implementation="x").model_args["attn_implementation"] == "x"


def test_the_weights_say_the_dtype_where_no_run_does(base):
    model, _ = get_model(found(base), trainable=False)
    assert model.dtype == torch.bfloat16


def test_an_adapter_without_a_word_is_asked_as_the_run_below(base, adapter):
    ran(base, template_args=TAGS, model_args={"torch_dtype": "float32"})
    section = found(adapter)
    assert section.template_args == TAGS and section.model_args["torch_dtype"] == "float32"
    ran(adapter, template_args={**TAGS, "user_start_tag": "later"})
    assert found(adapter).template_args["user_start_tag"] == "later"


def test_a_checkpoint_is_asked_as_its_run(base):
    checkpoint = base / "checkpoint-10"
    shutil.copytree(base, checkpoint)
    assert found(checkpoint).template_args == QUESTION_ANSWER
    ran(base, template_args=TAGS)
    assert found(checkpoint).template_args == TAGS


def test_what_is_set_wins(base):
    ran(base, template_args=TAGS, model_args={"torch_dtype": "float32"})
    section = found(base, template_args={"user_start_tag": "Mine "}, torch_dtype="float16")
    assert section.template_args == {**TAGS, "user_start_tag": "Mine "}
    assert section.model_args["torch_dtype"] == "float16"
    other = found(base, tokenizer_args={"pretrained_model_name_or_path": "other"})
    assert other.tokenizer_args["pretrained_model_name_or_path"] == "other"


def test_without_its_chat_template_a_model_gets_tags(base):
    section = found(can_chat(base), template_args={"apply_chat_template": False})
    assert section.template_args == QUESTION_ANSWER


def test_a_plain_adapter_takes_the_tokenizer_below_it(adapter, base):
    model, tokenizer = get_model(
        model_section(
            {"model_args": {"pretrained_model_name_or_path": str(adapter)}, "as_trained": True}
        ),
        trainable=False,
    )
    assert model.lineage.root == str(base) and len(tokenizer) == len(tiny.tokenizer())


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {"template_args": {"tag": 1}}}'])
def test_a_damaged_run_is_refused_in_words(base, content):
    (base / "run_config.json").write_text(content)
    with pytest.raises(InputError, match="does not say how this model was trained"):
        found(base)


def test_other_sections_stay_as_they_are(base):
    section = model_section({"model_args": {"pretrained_model_name_or_path": "nowhere/at/all"}})
    assert resolve_model(section).section is section
    with pytest.raises(InputError, match="There is no folder 'nowhere/at/all'"):
        found("nowhere/at/all")
