"""Gradient checkpointing takes time for memory: it is on where memory would not do without."""

import pytest
import tiny
from transformers import AutoConfig, GPT2Config, MixtralConfig

from unlora.runs.machine import GIB
from unlora.trainer.checkpointing import SHARE, bound, decided, is_auto
from unlora.trainer.largest_batch import Batch
from unlora.trainer.memory_estimate import Estimate

BATCHES = {"forget": Batch(4, 40, 100), "retain": Batch(4, 60, 200)}
LLAMA = AutoConfig.for_model("llama", **tiny.SHAPE)


def asked_for_nothing():
    raise AssertionError("a small model needs no estimate")


def estimated(*, with_it, without):
    """An estimate of so many bytes in all."""
    zeros = dict.fromkeys(Estimate.__dataclass_fields__, 0)
    return Estimate(
        **zeros | {"batches": BATCHES, "activations": with_it, "other_activations": without,
                   "checkpointing": True}
    )  # fmt: skip


@pytest.mark.parametrize(
    "args, expected",
    [
        ({}, False),
        ({"gradient_checkpointing": "auto"}, True),
        ({"gradient_checkpointing": True}, False),
        ({"activation_checkpointing": "auto"}, True),
        ({"gradient_checkpointing": "auto", "activation_checkpointing": False}, False),
    ],
)
def test_it_is_left_to_the_memory_by_either_name(args, expected):
    assert is_auto(args) == expected


def test_a_model_that_is_small_beside_the_memory_is_not_estimated():
    on, why = decided(BATCHES, LLAMA, asked_for_nothing, 8 * GIB)
    assert not on and why == "off: the model is small, and 8.0 GiB are available"


@pytest.mark.parametrize("available, expected", [(8 * GIB, False), (4 * GIB, True)])
def test_it_is_on_where_the_training_would_not_fit_without(available, expected):
    found = estimated(with_it=GIB, without=4 * GIB)
    on, why = decided(BATCHES, None, lambda: found, available)
    assert on == expected == (found.switched(False).total_bytes > SHARE * available)
    assert why.startswith("on: " if on else "off: ")
    assert "about 4.0 GiB are needed without it" in why


def test_it_is_on_where_one_cannot_know():
    def fails():
        raise ValueError("no such layer")

    assert decided(BATCHES, LLAMA, asked_for_nothing, None)[0]
    on, why = decided(BATCHES, None, fails, 8 * GIB)
    assert on and "no such layer" in why


def test_an_estimate_is_that_of_the_other_way_when_it_is_switched():
    found = estimated(with_it=1, without=4)
    assert found.switched(True) is found
    other = found.switched(False)
    assert other.total_bytes == 4 and not other.checkpointing and other.switched(True) == found


@pytest.mark.parametrize("architecture", [MixtralConfig(**tiny.SHAPE), GPT2Config()])
def test_what_is_no_plain_transformer_is_never_called_small(architecture):
    assert bound(BATCHES, architecture) == float("inf")
