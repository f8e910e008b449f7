"""Memory that runs out in the middle of a step: the run goes on, to the same result."""

import pytest
import torch
from small_trainer import METHODS, small_trainer, trained

from unlora.errors import InputError, is_out_of_memory
from unlora.trainer import Divergence


def small_memory(trainer, rows, where="forward"):
    """A device that holds no more than these rows at once, forward or backward."""
    failed, losses, asked = [], trainer.context.losses.compute, [0]

    def told(model, inputs, *args, **kwargs):
        asked[0] = max(len(part["number"]) for part in inputs.values())
        return losses(model, inputs, *args, **kwargs)

    def fail():
        failed.append(trainer.state.global_step + 1)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def forward(_module, args, output):
        if torch.is_grad_enabled() and asked[0] > rows:
            if where == "forward":
                fail()
            output.register_hook(lambda gradient: fail())  # all but the last gradients are there

    trainer.context.losses.compute = told
    if where == "backward":  # the frozen embedding's output needs a gradient to be asked for one
        trainer.model.enable_input_require_grads()
    trainer.model.get_input_embeddings().register_forward_hook(forward)
    return failed


def result(trainer):
    log = [
        {key: entry[key] for key in entry if key in ("loss", "forget_loss", "retain_loss")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return trained(trainer), log


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("method", METHODS)
def test_it_ends_as_a_run_with_smaller_batches_from_the_start(tmp_path, method, dropout, where):
    split = small_trainer(
        tmp_path, method, dropout=dropout, per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    if where == "backward":
        split.model.enable_input_require_grads()
    split.train()
    trainer = small_trainer(
        tmp_path, method, dropout=dropout, per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    failed = small_memory(trainer, 2, where)
    trainer.train()
    assert failed == [1], "once, and in the first step"
    assert trainer.splitter.facts == {"rows_at_once": 2, "of": 4, "from_step": 1}
    (weights, log), (expected, expected_log) = result(trainer), result(split)
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name
    for one, other in zip(log, expected_log, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_it_ends_as_the_run_that_has_memory_enough(tmp_path, caplog):
    settings = dict(per_device_train_batch_size=8, learning_rate=1e-3)
    whole = small_trainer(tmp_path, **settings)
    whole.train()
    trainer = small_trainer(tmp_path, **settings)
    failed = small_memory(trainer, 3, "backward")
    trainer.train()
    assert failed == [1, 1] and trainer.splitter.facts["rows_at_once"] == 2
    for name, weight in trained(whole).items():
        torch.testing.assert_close(trained(trainer)[name], weight, rtol=0, atol=1e-6)
    assert "Memory ran out at step 1 on 8 rows; going on with 4 at once" in caplog.text


def test_what_an_earlier_micro_batch_gave_is_not_counted_twice(tmp_path):
    """It runs out at the second micro-batch of the second step."""
    settings = dict(
        per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-3
    )
    whole = small_trainer(tmp_path, **settings)
    whole.train()
    trainer = small_trainer(tmp_path, **settings)
    losses, calls = trainer.context.losses.compute, []

    def once(model, inputs, *args, **kwargs):
        found = losses(model, inputs, *args, **kwargs)
        calls.append(len(inputs["forget"]["number"]))
        if len(calls) == 4:
            raise MemoryError
        return found

    trainer.context.losses.compute = once
    trainer.train()
    assert calls[:4] == [4] * 4 and calls[4:8] == [2] * 4 and len(calls) == 4 + 4 + 8
    for name, weight in trained(whole).items():
        torch.testing.assert_close(trained(trainer)[name], weight, rtol=0, atol=1e-6)


def test_a_loss_on_the_weights_counts_once(tmp_path):
    def penalty(model):
        return sum(p.square().sum() for n, p in model.named_parameters() if "lora_A" in n)

    found = []
    for memory in (99, 1):
        trainer = small_trainer(tmp_path, penalty=penalty)
        small_memory(trainer, memory)
        trainer.train()
        found.append(result(trainer))
    assert found[1][1] == [pytest.approx(entry, rel=1e-5) for entry in found[0][1]]
    for name, weight in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], weight, rtol=0, atol=1e-5)


def test_a_single_row_that_does_not_fit_is_one_sentence(tmp_path):
    trainer = small_trainer(tmp_path)
    small_memory(trainer, 0)
    with pytest.raises(InputError, match="on a single row of each part .*gradient_checkpointing"):
        trainer.train()


def test_another_error_is_not_taken_for_it(tmp_path):
    trainer = small_trainer(tmp_path, divergence=Divergence("skip"))

    def wrong(*args, **kwargs):
        raise RuntimeError("shapes do not match")

    trainer.context.losses.compute = wrong
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer.train()
    assert trainer.splitter.pieces == 1


@pytest.mark.parametrize("error, expected", [
    (torch.OutOfMemoryError("x"), True),
    (MemoryError(), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: not enough memory"),
     True),
    (RuntimeError("MPS backend out of memory"), True),
    (ValueError("out of memory"), False),
    (RuntimeError("shapes"), False),
])  # fmt: skip
def test_how_memory_runs_out(error, expected):
    assert is_out_of_memory(error) == expected
