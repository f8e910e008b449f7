"""Draws depend on seed, row and number of the draw, and are kept under all that they depend on."""

from dataclasses import replace

import pytest
import tiny

from unlora.data.chat_encoding import Chat
from unlora.evals.datasets import Source
from unlora.evals.eval_model import LazyModel
from unlora.evals.passes import Sampling, generate
from unlora.evals.passes.declaration import PASSES, PassInput, Settings
from unlora.evals.result_cache import ResultCache
from unlora.evals.runner import PassRunner

ROWS = [{"question": f"Who keeps the {x}?", "answer": f"Ada keeps {x}."} for x in "abcd"]
SETTINGS = Settings(max_new_tokens=6, samples=3, sample_seed=5)
CONFIG = {"handler": "QADataset", "hf_args": {}, "question_key": "question", "answer_key": "answer"}


@pytest.fixture(scope="module")
def lm():
    return tiny.llama().eval()


@pytest.fixture(scope="module")
def chat():
    return Chat(tiny.tokenizer(), {"apply_chat_template": True})


def source(chat, **config):
    return Source("forget", CONFIG | config, chat, lambda **hf_args: list(ROWS))


def draw(lm, data, **limits):
    asked = PASSES["sample"]
    (found,) = asked.run(lm, [data], **{"progress": lambda done: None, **limits})
    return asked.unpack(asked.pack(found, data), data)


def test_every_draw_is_one_text_by_its_own_key(lm, chat):
    data = PassInput(source(chat), range(4), SETTINGS)
    found = draw(lm, data)
    assert [one.reference for one in found] == [row["answer"] for row in ROWS]
    for row, one in enumerate(found):
        assert ROWS[row]["question"] in one.question
        for number, text in enumerate(one.texts):
            (alone,) = generate(
                lm, [data.prompts[row]], chat.tokenizer, end_ids=data.end_ids, max_new_tokens=6,
                sampling=Sampling([(5, row, number)]),
            )  # fmt: skip
            assert text == alone.strip()
    assert len({text for one in found for text in one.texts}) > 9


def test_draws_do_not_depend_on_batches_or_on_other_rows(lm, chat):
    whole = draw(lm, PassInput(source(chat), range(4), SETTINGS))
    assert draw(lm, PassInput(source(chat), range(4), SETTINGS), batch_size=1) == whole
    assert draw(lm, PassInput(source(chat), [3, 1], SETTINGS)) == [whole[3], whole[1]]
    more = draw(lm, PassInput(source(chat), range(4), replace(SETTINGS, samples=4)))
    assert [one.texts[:3] for one in more] == [one.texts for one in whole]


def test_a_text_ends_before_a_stop_string(lm, chat):
    free = draw(lm, PassInput(source(chat), range(4), SETTINGS))
    letter = next(x for one in free for text in one.texts for x in text[1:-1] if x.isalnum())
    found = draw(lm, PassInput(source(chat, stop=[letter]), range(4), SETTINGS))
    for one, whole in zip(found, free, strict=True):
        assert one.texts == tuple(text.split(letter)[0].strip() for text in whole.texts)


def test_what_is_drawn_is_kept_under_how_it_is_drawn(lm, chat, tmp_path):
    def runner(settings):
        rows = {"forget": range(4)}
        model, cache = LazyModel(lambda: lm, "model"), ResultCache(tmp_path)
        return PassRunner(model, {"forget": source(chat)}, rows, settings, cache)

    key = runner(SETTINGS).key("sample", "forget")
    changes = {"samples": 2, "temperature": 0.5, "top_p": 0.9, "sample_seed": 6,
               "max_new_tokens": 5}  # fmt: skip
    keys = [runner(replace(SETTINGS, **{k: v})).key("sample", "forget") for k, v in changes.items()]
    assert len({key, *keys}) == 6
    assert runner(replace(SETTINGS, batch_size=2)).key("sample", "forget") == key
    drawn = runner(SETTINGS).answer([("sample", "forget")])
    refusing = runner(SETTINGS)
    refusing.model = LazyModel(lambda: pytest.fail("asked again"), "model")
    assert refusing.answer([("sample", "forget")]) == drawn
    # the other passes know nothing of it
    generated = {runner(replace(SETTINGS, **{k: changes[k]})).key("generate", "forget")
                 for k in ("samples", "temperature", "top_p", "sample_seed")}  # fmt: skip
    assert len(generated) == 1


def test_a_prompt_is_told_as_done_once(lm, chat):
    data, done = PassInput(source(chat), range(4), SETTINGS), []
    draw(lm, data, progress=done.append, batch_size=3)
    assert sum(done) == sum(len(prompt) + 6 for prompt in data.prompts)
