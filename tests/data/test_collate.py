from tiny import rows

from unlora.data.collate import collate, collate_parts
from unlora.forward import IGNORE_INDEX


def test_the_mask_comes_from_the_length_even_if_the_pad_token_occurs_in_the_text():
    short, long = rows([2, 5])
    pad = short.input_ids[1]
    batch = collate([short, long], pad_id=pad)
    assert batch["attention_mask"].tolist() == [[1] * 6 + [0] * 3, [1] * 9]
    assert batch["input_ids"][0].tolist() == short.input_ids + [pad] * 3
    assert batch["labels"][0].tolist() == short.labels + [IGNORE_INDEX] * 3


def test_each_part_is_a_batch_of_its_own():
    a, b = rows([2, 5])
    batch = collate_parts([{"forget": a, "retain": b}, {"forget": b, "retain": a}], pad_id=0)
    assert set(batch) == {"forget", "retain"}
    assert batch["forget"]["input_ids"].shape == (2, 9)
