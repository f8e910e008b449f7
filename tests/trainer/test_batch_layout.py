"""How many rows go through a model at once: what keeps a GPU busy, and what memory allows."""

from types import SimpleNamespace

import pytest
import tiny
from transformers import AutoConfig

from unlora.runs.machine import GIB
from unlora.trainer.batch_layout import FILLED, Choices, may_choose
from unlora.trainer.largest_batch import Batch
from unlora.trainer.memory_estimate import Estimate

LLAMA = AutoConfig.for_model("llama", **tiny.SHAPE)
ROW, SAVED = GIB, 0.25  # bytes of a row without checkpointing, and what is left of them with it


def batches(rows, mean=100):
    return {"forget": Batch(rows, 120, 50 * rows, mean), "retain": Batch(rows, 90, 50 * rows, mean)}


def estimate(batches):
    zeros = dict.fromkeys(Estimate.__dataclass_fields__, 0)
    rows = batches["forget"].rows
    return Estimate(
        **zeros
        | {"batches": batches, "activations": rows * ROW,
           "other_activations": int(rows * ROW * SAVED), "checkpointing": False}
    )  # fmt: skip


def layout(step, gib, *, gpu=True, checkpointing=None, mean=100, estimate=estimate, arch=None):
    available = None if gib is None else int(gib * GIB)
    found = Choices(
        step, lambda rows: batches(rows, mean), estimate, arch, available, gpu, checkpointing
    ).layout()
    assert found.rows * found.accumulation == step  # the step has the rows that it had
    return found.rows, found.checkpointing


@pytest.mark.parametrize(
    "asked, expected",
    [
        # 70 % of the memory may be taken, a row needs 1 GiB, or a quarter of it
        ({"step": 64, "gib": 100}, (64, False)),
        ({"step": 64, "gib": 60}, (32, False)),  # 6,400 tokens are enough
        ({"step": 64, "gib": 40}, (64, True)),  # 16 without are 3,200 tokens: too few
        ({"step": 64, "gib": 10}, (16, True)),
        ({"step": 64, "gib": 0.01}, (1, True)),
        ({"step": 16, "gib": 100}, (16, False)),  # no more rows are there
        ({"step": 16, "gib": 10}, (16, True)),
        ({"step": 16, "gib": 10, "checkpointing": False}, (4, False)),
        ({"step": 16, "gib": 10, "checkpointing": True}, (16, True)),
        ({"step": 6, "gib": 5, "checkpointing": False}, (3, False)),
        # a processor is not faster with more than four
        ({"step": 64, "gib": 100, "gpu": False}, (4, False)),
        ({"step": 6, "gib": 100, "gpu": False}, (3, False)),
        ({"step": 16, "gib": 2, "gpu": False}, (4, True)),
        ({"step": 16, "gib": 1, "gpu": False}, (2, True)),
        # nobody knows: as it was before
        ({"step": 64, "gib": None}, (4, True)),
        ({"step": 64, "gib": None, "checkpointing": False}, (4, False)),
    ],
)
def test_as_many_rows_go_at_once_as_memory_allows(asked, expected):
    assert layout(**asked) == expected


def test_a_pack_that_fills_a_gpu_is_worth_checkpointing():
    rows, checkpointing = layout(64, 20, mean=100)
    assert checkpointing and rows * 2 * 100 >= FILLED
    # longer rows: fewer of them are as many tokens
    assert layout(64, 20, mean=300) == (8, False)


def refuse(batches):
    raise ValueError("no such layer")


def test_a_small_model_is_not_estimated_and_a_strange_one_goes_as_before():
    assert layout(16, 8, estimate=refuse, arch=LLAMA) == (16, False)
    assert layout(16, 8, estimate=refuse) == (4, True)


def test_it_says_why():
    words = Choices(16, batches, estimate, None, 100 * GIB, True).layout().why
    assert words == (
        "16 of the 16 rows of a step at once (about 3,200 tokens), gradient checkpointing off: "
        "about 16.0 GiB are needed, and 100.0 GiB are available"
    )


@pytest.mark.parametrize("world, drops, expected", [(1, False, True), (2, False, False),
                                                    (1, True, False)])  # fmt: skip
def test_several_processes_go_by_the_numbers_of_the_config(world, drops, expected):
    args = SimpleNamespace(world_size=world, dataloader_drop_last=drops)
    assert may_choose(args) == expected
