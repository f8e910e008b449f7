"""The reference's log-probabilities are computed once, before the first step, and kept."""

import logging

import pytest
import torch
from small_step import PAD, Stepper, lora_model
from small_trainer import LENGTHS
from tiny import llama, rows
from trainer.test_trainer import Passes, trainer_for

from unlora.data.pairs import Parts
from unlora.model.reference import as_reference, freeze_reference
from unlora.trainer import UnlearningLoss, reference_logps, term_losses
from unlora.trainer.reference_logps import precompute

NLL = {"retain_loss_type": "NLL"}
ALTERNATES = 3


def data(seed=0):
    """Three alternate answers, of other lengths, for every forget row."""
    alternate = [1 + i % 7 for i in range(ALTERNATES * len(LENGTHS["forget"]))]
    lengths = LENGTHS | {"alternate": alternate}
    return Parts(
        {part: rows(lengths[part], seed=seed + i) for i, part in enumerate(lengths)}, "forget"
    )


def stepper(handler, model=None, **args):
    """A run before its first step; the reference has been asked."""
    return Stepper(handler, NLL, model=lora_model() if model is None else model, **args)


def logps_of(run):
    return run.context.losses.reference_logps


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
    parts, compute = [], reference_logps._compute

    def watched(part, *args):
        parts.append(part)
        return compute(part, *args)

    monkeypatch.setattr(reference_logps, "_compute", watched)
    return parts


def folder_of(tmp_path):
    return sorted((tmp_path / "cache" / "reference").glob("*"))


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("handler, full", [("NPO", False), ("DPO", True)])
def test_no_step_asks_the_reference(tmp_path, handler, full):
    model = llama() if full else lora_model()
    counted = Passes(model)
    loss = UnlearningLoss.build(handler, **NLL)
    trainer = trainer_for(tmp_path, loss, model, parts=data(), callbacks=[counted])
    assert trainer.context.losses.frozen is None, "and no copy of the model is made"
    trainer.train()
    assert counted.by_step == [1] * 3


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("handler", ["NPO", "DPO"])
def test_the_losses_are_those_of_a_reference_that_is_asked_in_every_step(
    monkeypatch, handler, full
):
    """Over three epochs, so that every alternate of a row has its turn."""
    runs, passes = [], []
    for live in (False, True):
        model = llama() if full else lora_model()
        if live:
            monkeypatch.setattr(term_losses, "precompute", lambda *_, **__: {})
        run = stepper(handler, model, parts=data(), layout=(8, 1), learning_rate=1e-3)
        calls = []
        model.get_input_embeddings().register_forward_hook(lambda *_, c=calls: c.append(1))
        if live and full:
            run.context.losses.frozen = llama()
            embeddings = run.context.losses.frozen.get_input_embeddings()
            embeddings.register_forward_hook(lambda *_, c=calls: c.append(1))
        runs.append(run.run(6))
        passes.append(len(calls))
    assert passes == [6, 12], "one of them asks the reference in every step"
    first, second = runs
    # rows are padded to other widths and the sums run in another order: float32 rounding
    for one, other in zip(first.log, second.log, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert len({entry["loss"] for entry in first.log}) == 6


@pytest.mark.slow
def test_every_row_has_its_own_number():
    parts = data()
    expected = {part: [by_hand(llama(), row) for row in parts.rows[part]] for part in parts.rows}
    run = stepper("DPO", parts=parts, layout=(8, 1))
    assert set(logps_of(run)) == {"forget", "alternate"}
    for part, logps in logps_of(run).items():
        assert logps.tolist() == pytest.approx(expected[part], rel=1e-5)
        assert len({round(x, 2) for x in expected[part]}) > 0.9 * len(logps), "they differ"
    seen = set()
    for batch in run.batches(ALTERNATES * run.steps_of_an_epoch):
        view = run.context.losses.views(run.model, batch, ("forget",))["reference_alternate"]
        alternate = batch["alternate"]
        for ids, mask, logp in zip(
            alternate["input_ids"], alternate["attention_mask"], view.sequence_logps, strict=True
        ):
            tokens = ids[mask.bool()].tolist()
            number = [row.input_ids for row in parts.rows["alternate"]].index(tokens)
            assert float(logp) == pytest.approx(expected["alternate"][number], rel=1e-5)
            seen.add(number)
        questions = (alternate["number"] // ALTERNATES).tolist()
        assert questions == batch["forget"]["number"].tolist(), "an answer to this question"
    assert seen == set(range(len(parts.rows["alternate"]))), "every alternate has had its turn"


def test_a_second_run_reads_what_the_first_wrote(tmp_path, asked, caplog):
    caplog.set_level(logging.INFO, logger="unlora")
    first = stepper("DPO", parts=data())
    assert asked == ["alternate", "forget"] and len(folder_of(tmp_path)) == 2
    second = stepper("DPO", parts=data(), seed=5)
    assert len(asked) == 2 and "reference: 16 numbers read from" in caplog.text
    for part, logps in logps_of(first).items():
        assert torch.equal(logps, logps_of(second)[part])
    third = stepper("NPO", parts=data())  # shares the forget rows
    assert len(asked) == 2 and torch.equal(logps_of(third)["forget"], logps_of(first)["forget"])


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("harm", ["cut", "noise", "other length", "not a number", "other name"])
def test_a_broken_file_is_made_again(tmp_path, asked, harm):
    from safetensors.torch import load_file, save_file

    first = stepper("NPO")
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
    second = stepper("NPO")
    assert asked == ["forget", "forget"]
    assert torch.equal(logps_of(second)["forget"], logps_of(first)["forget"])
    assert folder_of(tmp_path) == [file] and file.read_bytes() == whole


@pytest.mark.default_cases(2)
@pytest.mark.parametrize(
    "change", ["nothing", "a token", "a label", "a weight", "an adapter below"]
)
def test_other_data_or_another_model_is_asked_again(asked, change):
    parts = data()
    stepper("NPO", parts=parts)
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
    run = stepper("NPO", model, parts=parts)
    assert len(asked) == (1 if change == "nothing" else 2)
    if change == "an adapter below":
        fresh = by_hand(llama(), forget[1])
        assert abs(float(logps_of(run)["forget"][1]) - fresh) > 0.1


def test_the_reference_is_asked_in_eval_mode(tmp_path, monkeypatch):
    """A continued adapter is its own reference, dropout and all."""
    model = lora_model(lora_dropout=0.5, init_lora_weights=False)
    freeze_reference(model)
    parts = data()
    model.eval()
    expected = [by_hand(model, row) for row in parts.rows["forget"]]
    model.train()
    assert by_hand(model, parts.rows["forget"][1]) != pytest.approx(expected[1], rel=1e-2)
    run = stepper("NPO", model, parts=parts)
    assert logps_of(run)["forget"].tolist() == pytest.approx(expected, rel=1e-5)
    modes = {name: module.training for name, module in model.named_modules()}
    monkeypatch.setenv("UNLORA_CACHE", str(tmp_path / "empty"))
    again = precompute(
        model, {"forget": parts.rows["forget"]}, frozen=None, way=run.context.losses.way,
        args=run.context.args, accelerator=run.context.accelerator, pad_id=PAD,
    )  # fmt: skip
    assert torch.equal(again["forget"], logps_of(run)["forget"])
    assert {name: module.training for name, module in model.named_modules()} == modes
    run.run(3)
    with as_reference(model) as reference:
        assert by_hand(reference, parts.rows["forget"][1]) == pytest.approx(expected[1], rel=1e-5)


def test_a_model_trained_in_full_is_asked_in_eval_mode_too():
    model, parts = llama(attention_dropout=0.5), data()
    expected = [by_hand(model.eval(), row) for row in parts.rows["forget"]]
    assert by_hand(model.train(), parts.rows["forget"][1]) != pytest.approx(expected[1], rel=1e-2)
    run = stepper("NPO", model, parts=parts)
    assert logps_of(run)["forget"].tolist() == pytest.approx(expected, rel=1e-5)
    assert model.training


@pytest.mark.slow
def test_an_interrupted_run_in_full_asks_the_model_that_it_started_from(tmp_path, asked):
    settings = dict(max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch")
    loss = UnlearningLoss.build("NPO", **NLL)
    whole = trainer_for(tmp_path / "run", loss, llama(), **settings)
    whole.train()
    for file in folder_of(tmp_path):
        file.unlink()
    again = trainer_for(tmp_path / "run", loss, llama(), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert len(asked) == 2 and torch.equal(logps_of(again)["forget"], logps_of(whole)["forget"])
    for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.slow
def test_a_model_trained_in_full_is_its_reference_before_the_first_step_only(tmp_path):
    model, parts = llama(), data()
    trainer = trainer_for(tmp_path, UnlearningLoss.build("NPO", **NLL), model, parts=parts)
    trainer.train()
    first = logps_of(trainer)["forget"].clone()
    assert first.tolist() == pytest.approx([by_hand(llama(), r) for r in parts.rows["forget"]])
    assert by_hand(model, parts.rows["forget"][1]) != pytest.approx(float(first[1]), rel=1e-3)
    trainer.train()
    assert torch.equal(logps_of(trainer)["forget"], first)


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("UNLORA_CACHE", str(tmp_path / "file"))
    run = stepper("NPO")
    assert "reference: the numbers are not kept" in caplog.text
    assert logps_of(run)["forget"].isfinite().all() and run.run().gradients


def test_an_objective_that_wants_more_than_a_number_is_not_served_by_one(tmp_path, asked):
    run = stepper("UNDIAL")
    assert not logps_of(run) and not asked and not folder_of(tmp_path)
