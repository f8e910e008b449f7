"""Memory that runs out in the middle of a step: the run goes on, to the same result."""

from itertools import product

import pytest
import torch
from accelerate import DistributedType
from small_step import Stepper, lora_model
from small_trainer import METHODS, RETAIN, small_trainer, trained

from unlora.errors import InputError, is_out_of_memory
from unlora.trainer import Divergence


def small_memory(model, context, rows, where="forward"):
    """A device that holds no more than these rows at once, forward or backward."""
    failed, losses, asked = [], context.losses.compute, [0]

    def told(model, batch, *args, **kwargs):
        asked[0] = max(len(part["number"]) for part in batch.values())
        return losses(model, batch, *args, **kwargs)

    def fail():
        failed.append(context.step_number)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def forward(_module, args, output):
        if torch.is_grad_enabled() and asked[0] > rows:
            if where == "forward":
                fail()
            output.register_hook(lambda gradient: fail())  # all but the last gradients are there

    context.losses.compute = told
    if where == "backward":  # the frozen embedding's output needs a gradient to be asked for one
        model.enable_input_require_grads()
    model.get_input_embeddings().register_forward_hook(forward)
    return failed


def result(trainer):
    log = [
        {key: entry[key] for key in entry if key in ("loss", "forget_loss", "retain_loss")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return trained(trainer), log


# every method, place and dropout with every other of its kind, by twos
COVERING = {
    ("NPO", 0.1, "backward"), ("NPO", 0.0, "forward"), ("RMU", 0.1, "forward"),
    ("RMU", 0.0, "backward"), ("PDU", 0.0, "forward"), ("PDU", 0.1, "backward"),
    ("BLADE", 0.1, "forward"), ("BLADE", 0.0, "backward"), ("GRU+SAM", 0.0, "forward"),
    ("GRU+SAM", 0.1, "backward"),
}  # fmt: skip


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("method, dropout, where", sorted(COVERING))
def test_a_step_ends_as_one_of_smaller_micro_batches(method, dropout, where):
    runs = []
    for layout in ((2, 2), (4, 1)):
        handler, method_args, plugins = METHODS[method]
        run = Stepper(
            handler, method_args, plugins, model=lora_model(lora_dropout=dropout), layout=layout,
            learning_rate=1e-3,
        )  # fmt: skip
        failed = small_memory(run.model, run.context, 2, where)
        runs.append(run.run(1))
    assert failed == [1], "once, and in the first step"
    split, run = runs
    assert not split.splitter.facts
    assert run.splitter.facts == {"rows_at_once": 2, "of": 4, "from_step": 1}
    for one, other in zip(run.gradients[0], split.gradients[0], strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert run.log[0] == pytest.approx(split.log[0], rel=1e-5)


RUN_BY_A_TRAINER = {("NPO", 0.1, "backward"), ("PDU", 0.0, "forward")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, dropout, where",
    [
        pytest.param(*case, marks=() if case in RUN_BY_A_TRAINER else pytest.mark.slow)
        for case in product(METHODS, (0.0, 0.1), ("forward", "backward"))
    ],
)
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
    failed = small_memory(trainer.model, trainer.context, 2, where)
    trainer.train()
    assert failed == [1], "once, and in the first step"
    assert trainer.splitter.facts == {"rows_at_once": 2, "of": 4, "from_step": 1}
    (weights, log), (expected, expected_log) = result(trainer), result(split)
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name
    for one, other in zip(log, expected_log, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
def test_it_ends_as_the_run_that_has_memory_enough(caplog):
    whole, run = (
        Stepper("NPO", RETAIN, model=lora_model(), layout=(8, 1), learning_rate=1e-3)
        for _ in range(2)
    )
    failed = small_memory(run.model, run.context, 3, "backward")
    whole.run(2), run.run(2)
    assert failed == [1, 1] and run.splitter.facts["rows_at_once"] == 2
    for p, q in zip(whole.model.parameters(), run.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert "Memory ran out at step 1 on 8 rows; going on with 4 at once" in caplog.text


def test_what_an_earlier_micro_batch_gave_is_not_counted_twice():
    """It runs out at the second micro-batch of the second step."""
    whole, run = (
        Stepper("NPO", RETAIN, model=lora_model(), layout=(4, 2), learning_rate=1e-3)
        for _ in range(2)
    )
    losses, calls = run.context.losses.compute, []

    def once(model, batch, *args, **kwargs):
        values = losses(model, batch, *args, **kwargs)
        calls.append(len(batch["forget"]["number"]))
        if len(calls) == 4:
            raise MemoryError
        return values

    run.context.losses.compute = once
    whole.run(3), run.run(3)
    assert calls[:4] == [4] * 4 and calls[4:8] == [2] * 4 and len(calls) == 4 + 4 + 4
    for p, q in zip(whole.model.parameters(), run.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    for one, other in zip(run.log, whole.log, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
def test_a_loss_on_the_weights_counts_once(tmp_path):
    def penalty(model):
        return sum(p.square().sum() for n, p in model.named_parameters() if "lora_A" in n)

    found = []
    for memory in (99, 1):
        trainer = small_trainer(tmp_path, penalty=penalty, max_steps=2)
        small_memory(trainer.model, trainer.context, memory)
        trainer.train()
        found.append(result(trainer))
    assert found[1][1] == [pytest.approx(entry, rel=1e-5) for entry in found[0][1]]
    for name, weight in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], weight, rtol=0, atol=1e-5)


def test_a_single_row_that_does_not_fit_is_one_sentence():
    run = Stepper("NPO", RETAIN, layout=(4, 1))
    small_memory(run.model, run.context, 0)
    with pytest.raises(InputError, match="on a single row of each part .*gradient_checkpointing"):
        run.run()


def test_of_several_processes_none_splits_a_step_alone(monkeypatch):
    run = Stepper("NPO", RETAIN, layout=(4, 1))
    small_memory(run.model, run.context, 2)
    monkeypatch.setitem(
        run.context.accelerator.state.__dict__, "distributed_type", DistributedType.MULTI_GPU
    )
    with pytest.raises(InputError, match="in one of several processes at step 1"):
        run.run()


@pytest.mark.slow
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
