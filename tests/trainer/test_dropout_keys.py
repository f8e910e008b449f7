"""With dropout, too, a run does not depend on how its rows are batched."""

import pytest
import torch
from peft import PeftModel
from small_trainer import small_trainer, trained
from tiny import llama

from unlora.forward.forward_pass import PLAIN
from unlora.forward.keyed_dropout import KeyedDropout
from unlora.model.lora import save_adapter
from unlora.trainer import term_losses as module


def learnt(folder, method, size, accumulation, *, dropout=0.05, **args):
    """The adapter after two steps of 16 rows, in float64."""
    trainer = small_trainer(
        folder, method, dropout=dropout, per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation, max_steps=2, learning_rate=1e-3, **args,
    )  # fmt: skip
    trainer.model.double()
    trainer.train()
    return trained(trainer)


def difference(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def without_packing(monkeypatch):
    monkeypatch.setattr(module, "found_way", lambda *_: PLAIN)


OTHERS = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("BLADE", "PDU", "GRU+SAM", "BalDRO", "RMU")
]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["NPO", *OTHERS])
def test_the_split_into_micro_batches_changes_nothing(tmp_path, method):
    whole = learnt(tmp_path, method, 16, 1)
    assert difference(whole, learnt(tmp_path, method, 2, 8)) < 1e-12


@pytest.mark.slow
def test_neither_packing_nor_the_checkpointing_of_layers_does(tmp_path, monkeypatch):
    whole = learnt(tmp_path, "NPO", 16, 1)
    assert difference(whole, learnt(tmp_path, "NPO", 16, 1, dropout=0.0)) > 1e-4
    assert difference(whole, learnt(tmp_path, "NPO", 4, 4, gradient_checkpointing=True)) < 1e-12
    without_packing(monkeypatch)
    assert difference(whole, learnt(tmp_path, "NPO", 8, 2)) < 1e-12
    again = learnt(tmp_path, "NPO", 8, 2, gradient_checkpointing=True)
    assert difference(whole, again) < 1e-12


@pytest.mark.slow
def test_layers_of_one_input_are_trained_as_peft_trains_them(tmp_path, monkeypatch):
    fused = learnt(tmp_path, "NPO", 8, 2)
    monkeypatch.setattr(module, "fuse_lora", lambda *_: None)
    assert difference(fused, learnt(tmp_path, "NPO", 8, 2)) < 1e-12


@pytest.mark.slow
def test_the_seed_of_the_run_is_that_of_its_dropout(tmp_path):
    fixed = {"data_seed": 0}  # so the rows are the same
    whole = learnt(tmp_path, "NPO", 16, 1, seed=1, **fixed)
    assert difference(whole, learnt(tmp_path, "NPO", 16, 1, seed=2, **fixed)) > 1e-4


@pytest.mark.slow
def test_an_adapter_is_saved_loaded_and_merged_as_ever(tmp_path):
    trainer = small_trainer(tmp_path / "run", dropout=0.05, save_strategy="steps", save_steps=2)
    modules = [m for m in trainer.model.modules() if isinstance(m, KeyedDropout)]
    assert len(modules) == 7  # q, v and down of two layers, and the head
    trainer.train()
    assert [m for m in trainer.model.modules() if isinstance(m, KeyedDropout)] == modules
    save_adapter(trainer.model, tmp_path / "saved")
    ids = torch.arange(1, 9)[None]
    model = trainer.model.eval()
    said = model(input_ids=ids).logits
    again = PeftModel.from_pretrained(llama(), tmp_path / "saved").eval()
    torch.testing.assert_close(again(input_ids=ids).logits, said)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, said, rtol=1e-4, atol=1e-4)
