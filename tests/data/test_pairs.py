import numpy as np
from tiny import rows

from unlora.data.pairs import KeyedSampler, Parts


def sampler(forget=10, retain=23, seed=0):
    parts = Parts({"forget": rows([1] * forget), "retain": rows([1] * retain)}, "forget")
    return KeyedSampler(parts, seed)


def epochs(sampler, numbers):
    drawn = []
    for number in numbers:
        sampler.set_epoch(number)
        drawn.append([(x["forget"], x["retain"]) for x in sampler])
    return drawn


def test_an_epoch_sees_every_anchor_row_once_in_its_own_order():
    one, two = epochs(sampler(), [0, 1])
    assert sorted(f for f, _ in one) == sorted(f for f, _ in two) == list(range(10))
    assert [f for f, _ in one] != [f for f, _ in two]


def test_every_retain_row_is_drawn_before_one_repeats():
    drawn = [r for epoch in epochs(sampler(10, 25), [0, 1, 2, 3, 4]) for _, r in epoch]
    assert sorted(drawn[:25]) == sorted(drawn[25:]) == list(range(25))


def test_pairs_depend_on_seed_and_epoch_alone():
    np.random.seed(1)
    first = epochs(sampler(), [3])
    np.random.seed(2)
    assert epochs(sampler(), [0, 1, 2, 3])[-1:] == first
    assert epochs(sampler(seed=1), [3]) != first


def test_an_alternate_answer_goes_with_its_question():
    data = {part: rows([1] * 5) for part in ("forget", "alternate")}
    assert all(x["forget"] == x["alternate"] for x in KeyedSampler(Parts(data, "forget"), 0))
