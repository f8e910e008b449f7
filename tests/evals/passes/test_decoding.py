"""Of every family a row in a batch is continued as it is alone, or it is alone."""

import families
import pytest
import tiny
import torch
from transformers import LlamaForCausalLM

from unlora.evals.passes import generate
from unlora.evals.passes.decoding import Decoding, decoding_of

STEPS = 8
# a row's state in every layer, in half of them, in layers beside attention, that reads padding
DEFAULT = {"mamba", "qwen3_5_text", "falcon_h1", "minimax"}


@pytest.fixture
def prompts():
    return [row.input_ids for row in tiny.rows([3, 1, 6, 2])]


@torch.no_grad()
def alone(model, prompt, ends=()):
    """Token by token, everything read again for each."""
    tokens = []
    for _ in range(STEPS):
        ids = torch.tensor([[*prompt, *tokens]])
        token = int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        tokens.append(token)
    return tokens


def text(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def write(model, prompts, tokenizer, ends=()):
    return generate(model, prompts, tokenizer, end_ids=list(ends), max_new_tokens=STEPS)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in DEFAULT else pytest.mark.slow)
        for name in families.HERE
    ],
)
def test_every_row_is_continued_as_it_is_alone(family, prompts, tokenizer, caplog):
    model = families.model(family)
    free = [alone(model, prompt) for prompt in prompts]
    ends = {free[0][2], free[3][4]}  # so that rows end at different steps
    expected = [text(tokenizer, alone(model, prompt, ends)) for prompt in prompts]
    assert len(set(expected)) > 2
    assert write(model, prompts, tokenizer, ends) == expected
    assert "deprecated" not in caplog.text  # names of a cache that will go


@pytest.mark.default_cases(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "falcon_h1", "granitemoehybrid", "mamba", "minimax"])
def test_the_fastest_way_that_is_right_is_taken(family, dtype, tokenizer):
    model = families.model(family).to(dtype)
    found = decoding_of(model, tokenizer.pad_token_id)
    assert found.padding == (family != "minimax")
    assert found.masks_past == (family != "mamba" or found.cache is None)
    if not families.BEFORE_5 or family == "llama":
        assert found.cache is not None and found.selects == (family != "minimax")


def test_rows_leave_the_cache_of_a_hybrid(prompts, tokenizer):
    model, seen = families.model("falcon_h1"), []
    decoding_of(model, tokenizer.pad_token_id)
    ends = {alone(model, prompts[0])[1]}
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    write(model, prompts, tokenizer, ends)
    assert seen[0] == (4, 10) and seen[-1][0] < 4
    assert families.BEFORE_5 or {new for _, new in seen[1:]} == {1}


def test_a_cache_of_an_unknown_name_is_not_handed_over_and_a_line_says_so(
    prompts, tokenizer, caplog
):
    model = tiny.llama().eval()
    expected = [text(tokenizer, alone(model, prompt)) for prompt in prompts]

    class Renamed(LlamaForCausalLM):
        def forward(self, input_ids, attention_mask=None, position_ids=None, states=None, **others):
            passed = {k: v for k, v in others.items() if k == "use_cache"}
            return super().forward(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                **passed,
            )  # fmt: skip

    model.__class__ = Renamed
    assert write(model, prompts, tokenizer) == expected
    assert decoding_of(model, tokenizer.pad_token_id) == Decoding(padding=True)
    assert "takes no cache that gives the same logits" in caplog.text


def test_a_model_that_takes_its_padding_for_text_is_asked_row_by_row(prompts, tokenizer, caplog):
    model = families.model("minimax")
    seen = []
    decoding_of(model, tokenizer.pad_token_id)
    assert "MiniMaxForCausalLM does not tell padding from text" in caplog.text
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    write(model, prompts, tokenizer)
    assert set(seen) == {1}


def test_memory_that_runs_out_while_trying_is_not_taken_for_an_answer(tokenizer, monkeypatch):
    model = tiny.llama().eval()

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Decoding, "_logits", full)
    with pytest.raises(torch.OutOfMemoryError):
        decoding_of(model, tokenizer.pad_token_id)
