"""The reference's numbers are asked for once, before the first step, and kept."""

import logging

import pytest
import torch
from tiny import llama, rows
from trainer.test_trainer import LENGTHS, Passes, lora_model, losses, trainer_for

from unlora.data.pairs import Parts
from unlora.model.reference import as_reference, freeze_reference
from unlora.trainer import UnlearningLoss, reference_logps
from unlora.trainer import trainer as trainer_module

NLL = {"retain_loss_type": "NLL"}
ALTERNATES = 3


def loss_of(handler):
    return UnlearningLoss.build(handler, **NLL)


def data(seed=0):
    """Three alternate answers, of other lengths, for every forget row."""
    alternate = [1 + i % 7 for i in range(ALTERNATES * len(LENGTHS["forget"]))]
    lengths = LENGTHS | {"alternate": alternate}
    return Parts(
        {part: rows(lengths[part], seed=seed + i) for i, part in enumerate(lengths)}, "forget"
    )


def by_hand(model, row):
    """log p(answer) of one row, without padding."""
    ids = torch.tensor([row.input_ids])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    scored = torch.tensor(row.labels[1:]) != -100
    return float(logps.gather(-1, ids[0, 1:, None])[scored].sum())


@pytest.fixture
def asked(monkeypatch):
    """The parts that the reference is asked about, in order."""
    parts, usual = [], reference_logps._asked

    def watched(reference, rows, part, trainer):
        parts.append(part)
        return usual(reference, rows, part, trainer)

    monkeypatch.setattr(reference_logps, "_asked", watched)
    return parts


def folder_of(tmp_path):
    return sorted((tmp_path / "cache" / "reference").glob("*"))


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("handler, passes", [("NPO", 1), ("DPO", 1)])
def test_no_step_asks_the_reference(tmp_path, handler, passes, full):
    model = llama() if full else lora_model()
    counted = Passes(model)
    trainer = trainer_for(tmp_path, loss_of(handler), model, parts=data(), callbacks=[counted])
    assert trainer.frozen is None, "and no copy of the model is made"
    trainer.train()
    assert counted.by_step == [passes] * 3


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("handler", ["NPO", "DPO"])
def test_the_losses_are_those_of_a_reference_that_is_asked_in_every_step(
    tmp_path, monkeypatch, handler, full
):
    """Over three epochs, so that every alternate of a row has its turn."""
    found, numbers = [], []
    for live in (False, True):
        model = llama() if full else lora_model()
        counted = Passes(model)
        trainer = trainer_for(
            tmp_path, loss_of(handler), model, parts=data(), max_steps=6, callbacks=[counted],
            learning_rate=1e-3,
        )  # fmt: skip
        if live:
            if full:
                trainer.frozen = llama()
                trainer.frozen.get_input_embeddings().register_forward_hook(counted._count)
            monkeypatch.setattr(trainer_module, "known_logps", lambda _: {})
        trainer.train()
        found.append(trainer)
        numbers.append(counted.by_step[0])
    assert numbers[0] < numbers[1], "one of them asks the reference in every step"
    first, second = found
    # rows are padded to other widths and the sums run in another order: float32 rounding
    assert losses(first) == pytest.approx(losses(second), rel=1e-5)
    for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert len(set(losses(first))) == 6


def test_every_row_has_its_own_number(tmp_path):
    model, parts = lora_model(), data()
    said = {part: [by_hand(llama(), row) for row in parts.rows[part]] for part in parts.rows}
    trainer = trainer_for(tmp_path, loss_of("DPO"), model, parts=parts, max_steps=1)
    trainer.train()
    assert set(trainer.known) == {"forget", "alternate"}
    for part, logps in trainer.known.items():
        assert logps.tolist() == pytest.approx(said[part], rel=1e-5)
        assert len({round(x, 2) for x in said[part]}) > 0.9 * len(said[part]), "they differ"
    loader, seen = trainer.get_train_dataloader(), set()
    for epoch in range(ALTERNATES):
        loader.set_epoch(epoch)
        for batch in loader:
            view = trainer.views(model, batch, ("forget",))["reference_alternate"]
            alternate = batch["alternate"]
            for ids, mask, logp in zip(
                alternate["input_ids"],
                alternate["attention_mask"],
                view.sequence_logps,
                strict=True,
            ):
                tokens = ids[mask.bool()].tolist()
                number = [row.input_ids for row in parts.rows["alternate"]].index(tokens)
                assert float(logp) == pytest.approx(said["alternate"][number], rel=1e-5)
                seen.add(number)
            questions = (alternate["number"] // ALTERNATES).tolist()
            assert questions == batch["forget"]["number"].tolist(), "an answer to this question"
    assert seen == set(range(len(parts.rows["alternate"]))), "every alternate has had its turn"


def test_a_second_trainer_reads_what_the_first_wrote(tmp_path, asked, caplog):
    caplog.set_level(logging.INFO, logger="unlora")
    first = trainer_for(tmp_path, loss_of("DPO"), parts=data())
    first.train()
    assert asked == ["alternate", "forget"] and len(folder_of(tmp_path)) == 2
    second = trainer_for(tmp_path, loss_of("DPO"), parts=data(), seed=5)
    second.train()
    assert len(asked) == 2 and "reference: 16 numbers read from" in caplog.text
    for part, logps in first.known.items():
        assert torch.equal(logps, second.known[part])
    third = trainer_for(tmp_path, loss_of("NPO"), parts=data())  # shares the forget rows
    third.train()
    assert len(asked) == 2 and torch.equal(third.known["forget"], first.known["forget"])


@pytest.mark.parametrize("harm", ["cut", "noise", "other length", "not a number", "other name"])
def test_a_broken_file_is_made_again(tmp_path, asked, harm):
    from safetensors.torch import load_file, save_file

    first = trainer_for(tmp_path, loss_of("NPO"))
    first.train()
    (file,) = folder_of(tmp_path)
    whole = file.read_bytes()
    logps = load_file(file)["logps"]
    if harm == "cut":
        file.write_bytes(whole[:-5])
    elif harm == "noise":
        file.write_bytes(b"\x00" * len(whole))
    elif harm == "other length":
        save_file({"logps": logps[1:].contiguous()}, file)
    elif harm == "not a number":
        save_file({"logps": logps * float("nan")}, file)
    else:
        save_file({"others": logps}, file)
    second = trainer_for(tmp_path, loss_of("NPO"))
    second.train()
    assert asked == ["forget", "forget"]
    assert torch.equal(second.known["forget"], first.known["forget"])
    assert folder_of(tmp_path) == [file] and file.read_bytes() == whole


@pytest.mark.parametrize(
    "change", ["nothing", "a token", "a label", "a weight", "an adapter below"]
)
def test_other_data_or_another_model_is_asked_again(tmp_path, asked, change):
    parts = data()
    trainer_for(tmp_path, loss_of("NPO"), parts=parts).train()
    model, forget = lora_model(), parts.rows["forget"]
    if change == "a token":
        forget[3].input_ids[0] += 1
    elif change == "a label":
        forget[3].labels[-1] = -100
    elif change == "a weight":
        with torch.no_grad():
            model.base_model.model.model.layers[1].mlp.up_proj.weight[3, 3] += 0.01
    elif change == "an adapter below":
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_()
        freeze_reference(model)
    trainer = trainer_for(tmp_path, loss_of("NPO"), model, parts=parts)
    trainer.train()
    assert len(asked) == (1 if change == "nothing" else 2)
    if change == "an adapter below":
        fresh = by_hand(llama(), forget[1])
        assert abs(float(trainer.known["forget"][1]) - fresh) > 0.1


def test_the_reference_is_asked_in_eval_mode(tmp_path):
    """A continued adapter is its own reference, dropout and all."""
    model = lora_model(lora_dropout=0.5, init_lora_weights=False)
    freeze_reference(model)
    parts = data()
    model.eval()
    said = [by_hand(model, row) for row in parts.rows["forget"]]
    model.train()
    assert by_hand(model, parts.rows["forget"][1]) != pytest.approx(said[1], rel=1e-2)
    trainer = trainer_for(tmp_path, loss_of("NPO"), model, parts=parts)
    modes = {name: module.training for name, module in model.named_modules()}
    trainer.known = reference_logps.known_logps(trainer)
    assert trainer.known["forget"].tolist() == pytest.approx(said, rel=1e-5)
    assert {name: module.training for name, module in model.named_modules()} == modes
    trainer.train()
    with as_reference(model) as reference:
        assert by_hand(reference, parts.rows["forget"][1]) == pytest.approx(said[1], rel=1e-5)


def test_a_model_trained_in_full_is_asked_in_eval_mode_too(tmp_path):
    model, parts = llama(attention_dropout=0.5), data()
    said = [by_hand(model.eval(), row) for row in parts.rows["forget"]]
    assert by_hand(model.train(), parts.rows["forget"][1]) != pytest.approx(said[1], rel=1e-2)
    trainer = trainer_for(tmp_path, loss_of("NPO"), model, parts=parts)
    assert reference_logps.known_logps(trainer)["forget"].tolist() == pytest.approx(said, rel=1e-5)
    assert model.training


def test_an_interrupted_run_in_full_asks_the_model_that_it_started_from(tmp_path, asked):
    settings = dict(max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch")
    whole = trainer_for(tmp_path / "run", loss_of("NPO"), llama(), **settings)
    whole.train()
    for file in folder_of(tmp_path):
        file.unlink()
    again = trainer_for(tmp_path / "run", loss_of("NPO"), llama(), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert len(asked) == 2 and torch.equal(again.known["forget"], whole.known["forget"])
    for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_model_trained_in_full_is_its_reference_before_the_first_step_only(tmp_path):
    model, parts = llama(), data()
    trainer = trainer_for(tmp_path, loss_of("NPO"), model, parts=parts)
    trainer.train()
    first = trainer.known["forget"].clone()
    assert first.tolist() == pytest.approx([by_hand(llama(), r) for r in parts.rows["forget"]])
    assert by_hand(model, parts.rows["forget"][1]) != pytest.approx(float(first[1]), rel=1e-3)
    trainer.train()
    assert torch.equal(trainer.known["forget"], first)


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("UNLORA_CACHE", str(tmp_path / "file"))
    trainer = trainer_for(tmp_path, loss_of("NPO"))
    trainer.train()
    assert "reference: the numbers are not kept" in caplog.text
    assert trainer.state.global_step == 3


def test_an_objective_that_wants_more_than_a_number_is_not_served_by_one(tmp_path, asked):
    trainer = trainer_for(tmp_path, loss_of("UNDIAL"))
    trainer.train()
    assert not trainer.known and not asked and not folder_of(tmp_path)
