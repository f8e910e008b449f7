"""Rows that follow one another in a sequence say what they say alone."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import LORA, llama, qwen2, rows

from unlora.data.collate import collate
from unlora.forward.forward_pass import PLAIN, Way, ask_all
from unlora.forward.outputs import Hidden, Outputs, TokenLogps
from unlora.forward.packing import flat, packed
from unlora.forward.row_attention import attend_by_rows

PACKED, ALL = Way(packs=True), Way(packs=True, chunks=True)
FLAT = [Way(flat=True), Way(flat=True, chunks=True), Way(flat=True, common=2)]


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
    attend_by_rows()
    for way in (PACKED, Way(chunks=True), ALL, *(FLAT if attention == "sdpa" else [])):
        for ours, theirs in zip(asked(way), expected, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other.to(one.dtype), rtol=0, atol=1e-6)


def beginning_alike(common, *parts):
    """Batches whose rows begin with the same tokens, all in the prompt."""
    made = batches(*parts)
    for batch in made:
        batch["input_ids"][:, :common] = torch.arange(common) + 5
    return made


@pytest.mark.parametrize("common", [1, 3])
@pytest.mark.parametrize("kind", [TokenLogps, Hidden])
def test_what_rows_begin_with_is_computed_once(common, kind):
    model = get_peft_model(llama().double(), LoraConfig(**LORA, init_lora_weights=False)).eval()
    model.double()
    learnt = [p for p in model.parameters() if p.requires_grad]
    given = [(kind, batch) for batch in beginning_alike(common, [3, 7, 1, 20], [5, 2])]
    tokens = []
    model.get_input_embeddings().register_forward_hook(
        lambda _module, args, _output: tokens.append(args[0].numel())
    )
    attend_by_rows()

    def asked(way):
        answers = ask_all(model, given, layer=1, way=way)
        numbers = [x.states if kind is Hidden else x.token_logps for x in answers]
        loss = sum((n * torch.linspace(0, 1, n.numel()).view_as(n)).sum() for n in numbers)
        return [*numbers, *torch.autograd.grad(loss, learnt, allow_unused=True)]

    expected, whole = asked(Way(flat=True)), tokens.pop()
    for found, other in zip(asked(Way(flat=True, common=common)), expected, strict=True):
        if other is not None:
            torch.testing.assert_close(found, other, rtol=1e-6, atol=1e-5)  # norms are float32
    assert tokens.pop() == whole - 5 * common


def test_a_row_that_begins_otherwise_is_not_cut():
    given = beginning_alike(3, [3, 7], [5])
    given[1]["input_ids"][0, 0] += 1
    assert flat(given, common=3).common == 0
    assert flat(given[:1], common=3).common == 3
    assert flat(given[:1], common=7).common == 0  # more than the shortest row has


def test_a_flat_sequence_has_no_padding_and_like_rows_are_attended_to_together():
    layout = flat(batches([3, 40, 38], [4]), common=0)
    assert layout.inputs["input_ids"].shape == (1, 4 * 4 + 3 + 40 + 38 + 4)
    assert layout.inputs["rows"].shapes == [(2, 44), (2, 8)]


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
