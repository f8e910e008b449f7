"""Rows that follow one another in a sequence say what they say alone."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import LORA, llama, qwen2, rows

from unlora.data.collate import collate
from unlora.forward.outputs import PLAIN, Hidden, Outputs, TokenLogps, Way, ask_all
from unlora.forward.packing import packed

PACKED, ALL = Way(packs=True), Way(packs=True, chunks=True)


def batches(*lengths):
    return [collate(rows(list(some)), pad_id=0) for some in lengths]


def unpacked(layout, batch, n):
    ids, begin = layout.inputs["input_ids"].flatten(), layout.offsets[n]
    return [
        ids[start : start + int(mask.sum())].tolist()
        for start, mask in zip(begin.tolist(), batch["attention_mask"], strict=True)
    ]


def test_every_token_is_there_once():
    given = batches([3, 7, 1], [12, 2])
    layout = packed(given, width=64)
    for n, batch in enumerate(given):
        expected = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        assert unpacked(layout, batch, n) == expected
    ids, positions = layout.inputs["input_ids"], layout.inputs["position_ids"]
    assert ids.shape == positions.shape
    begin = torch.cat(list(layout.offsets))
    assert (positions.flatten()[begin] == 0).all(), "positions start again with each row"


def test_rows_of_equal_length_stay_apart():
    """Packing them would make attention look at more and save nothing."""
    (batch,) = batches([9, 9, 9, 9])
    assert packed([batch], width=16).inputs["input_ids"].shape == batch["input_ids"].shape


def test_flash_attention_gets_one_sequence():
    assert len(packed(batches([3, 9], [4]), width=16, single=True).inputs["input_ids"]) == 1


def test_little_is_padding():
    """Of rows as long as TOFU's, in micro-batches of 4 forget and 4 retain rows."""
    draw, real, spent = np.random.default_rng(0), 0, 0
    for _ in range(50):
        lengths = draw.integers(40, 120, size=(2, 4))
        layout = packed(batches(*lengths.tolist()), width=512)
        spent += layout.inputs["input_ids"].numel()
        real += sum(int(batch["attention_mask"].sum()) for batch in batches(*lengths.tolist()))
    assert 1 - real / spent < 0.05


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("make", [llama, qwen2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "kinds", [(Outputs, TokenLogps), (TokenLogps, TokenLogps), (Hidden, Hidden)]
)
def test_answers_and_gradients_are_those_of_padded_rows(make, attention, kinds):
    made = make().double()
    made.set_attn_implementation(attention)
    model = get_peft_model(made, LoraConfig(**LORA, init_lora_weights=False)).double().eval()
    learnt = [p for p in model.parameters() if p.requires_grad]
    given = list(zip(kinds, batches([3, 7, 1], [5, 2]), strict=True))

    def asked(way):
        answers = ask_all(model, given, layer=0, way=way)
        numbers = [x.states if isinstance(x, Hidden) else x.token_logps for x in answers]
        loss = sum((n * torch.linspace(0, 1, n.numel()).view_as(n)).sum() for n in numbers)
        found = torch.autograd.grad(loss, learnt, allow_unused=True)
        return numbers, [torch.zeros(1) if g is None else g for g in found]

    expected = asked(PLAIN)
    for way in (PACKED, Way(chunks=True), ALL):
        for ours, theirs in zip(asked(way), expected, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other.to(one.dtype), rtol=0, atol=1e-6)


def test_parts_share_a_pass():
    model, calls = llama().eval(), []
    model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    given = [(TokenLogps, batch) for batch in batches([3, 7], [5, 2])]
    ask_all(model, given, way=ALL)
    assert len(calls) == 1
    ask_all(model, given, way=PLAIN)
    assert len(calls) == 3


def test_of_many_rows_one_a_sequence_is_tried_too():
    """Where attention weighs most, long rows of one length are best left alone."""
    ids = torch.ones(130, 40, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": ids}
    assert packed([batch], width=1).inputs["input_ids"].shape == (130, 40)
