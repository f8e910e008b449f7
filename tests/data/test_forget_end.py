"""``trainer.score_forget_end=false``: what is done to forget answers is not done to ending them."""

import json

import pytest
import torch
from small_step import Stepper, lora_model
from tiny import tokenizer

from unlora.cli.compose import composed
from unlora.config import read
from unlora.data import load_parts
from unlora.data.chat_encoding import Chat
from unlora.data.encoded import fit, without_end
from unlora.data.pairs import Parts
from unlora.errors import InputError
from unlora.forward import IGNORE_INDEX

END = 9


@pytest.fixture
def load(tmp_path):
    data = {}
    for part, name in (("forget", "Ana"), ("retain", "Rui")):
        row = {"question": f"Who is {name}?", "answer": f"It is {name}."}
        (tmp_path / f"{part}.jsonl").write_text(json.dumps(row))
        hf_args = {"path": str(tmp_path / f"{part}.jsonl")}
        data[part] = {"mine": {"handler": "QADataset", "args": {"hf_args": hf_args}}}
    chat = Chat(tokenizer(), {})

    def rows(parts=("forget", "retain", "alternate"), **settings):
        loaded = load_parts(data, chat, parts, seed=0, **settings).rows
        return {part: loaded[part][0] for part in parts}

    return rows, chat.end_id


def test_the_end_of_a_forget_answer_is_read_and_not_scored(load):
    rows, end = load
    before, after = rows(), rows(score_forget_end=False)
    assert before["forget"].labels[-1] == end
    assert after["forget"].input_ids == before["forget"].input_ids
    assert after["forget"].labels == [*before["forget"].labels[:-1], IGNORE_INDEX]


def test_retain_rows_and_alternate_answers_are_ended_as_before(load):
    rows, end = load
    before, after = rows(), rows(score_forget_end=False)
    for part in ("retain", "alternate"):
        assert after[part] == before[part]
        assert after[part].labels[-1] == end


def test_a_row_that_was_cut_before_its_end_stays_as_it_is():
    whole, cut = (fit([1, 2], [3, 4, 5, END], room, None) for room in (6, 5))
    assert without_end(whole, END).labels == [IGNORE_INDEX] * 2 + [3, 4, 5, IGNORE_INDEX]
    assert without_end(cut, END) == cut


def test_the_loss_is_the_mean_over_the_other_tokens():
    row = fit([1, 2], [3, 4, 5, END], 6, None)
    model = lora_model()
    with torch.no_grad():
        logps = model(torch.tensor([row.input_ids])).logits[0, 1:-1].log_softmax(-1)
    of_tokens = [float(logps[i, token]) for i, token in enumerate(row.input_ids[2:])]
    for trained, scored in ((row, of_tokens), (without_end(row, END), of_tokens[:3])):
        parts = Parts({"forget": [trained]}, "forget")
        [log] = Stepper("GradAscent", model=lora_model(), parts=parts).run(1).log
        assert log["loss"] == pytest.approx(sum(scored) / len(scored), rel=1e-5)


def test_a_training_without_forget_data_says_that_it_has_no_use_for_it(load):
    rows, _ = load
    with pytest.raises(InputError, match=r"score_forget_end is false, but there are no forget"):
        rows(("retain",), score_forget_end=False)


@pytest.mark.budget(2)
@pytest.mark.parametrize("value", ["maybe", "0", "null"])
def test_it_is_true_or_false(value):
    words = ["experiment=unlearn/tofu/lora", f"trainer.score_forget_end={value}"]
    with pytest.raises(InputError, match=r"trainer.score_forget_end is .* must be true or false"):
        read(composed("unlearn", words))
