import numpy as np
import pytest
from tiny import rows

from unlora.data.collate import collate_parts
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


def alternates(forget, retain, choices, anchor):
    lengths = {"forget": forget, "retain": retain, "alternate": forget * choices}
    parts = Parts({part: rows([1] * size) for part, size in lengths.items()}, anchor)
    return KeyedSampler(parts, 0)


@pytest.mark.parametrize(
    "forget, retain, anchor", [(6, 8, "forget"), (6, 20, "retain"), (6, 5, "retain")]
)
def test_every_alternate_of_a_row_has_its_turn_before_one_comes_again(forget, retain, anchor):
    drawing = alternates(forget, retain, 3, anchor)
    drawn = {row: [] for row in range(forget)}
    for epoch in range(12):
        drawing.set_epoch(epoch)
        for index in drawing:
            assert index["alternate"] // 3 == index["forget"], "an answer to this question"
            drawn[index["forget"]].append(index["alternate"] % 3)
    for turns in drawn.values():
        assert len(turns) >= 9
        for i in range(0, 9, 3):
            assert set(turns[i : i + 3]) == {0, 1, 2}
    assert len({turns[0] for turns in drawn.values()}) > 1, "not all begin with the first"


def test_an_item_knows_which_row_of_each_part_it_is():
    drawing = alternates(4, 7, 3, "forget")
    for index in drawing:
        item = drawing.parts[index]
        assert {part: row.number for part, row in item.items()} == index
        batch = collate_parts([item, drawing.parts[index]], pad_id=0)
        for part, number in index.items():
            assert batch[part]["number"].tolist() == [number, number]
    assert all(row.number == 0 for row in drawing.parts.rows["retain"]), "the data are unchanged"


def test_an_epoch_is_filled_up_with_blanks_for_many_processes():
    whole, filled = sampler(11, 14), sampler(11, 14)
    filled.at_once = 4
    blank = {"forget": -1, "retain": -1}
    for epoch in range(3):
        whole.set_epoch(epoch), filled.set_epoch(epoch)
        assert len(filled) == len(list(filled)) == 12
        assert list(filled) == [*whole, blank], "no row comes twice"
    row, stand_in = (filled.parts[i] for i in ({"forget": 3, "retain": 5}, blank))
    assert collate_parts([row, stand_in], 0)["retain"]["number"].tolist() == [5]
    assert collate_parts([stand_in, stand_in], 0)["forget"]["number"].tolist() == [-1]
