"""What a suite asks about is what its config says, and no prompt tells of the answer."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from unlora.data.chat_encoding import Chat
from unlora.errors import InputError
from unlora.evals.dataset_checks import check_source
from unlora.evals.datasets import Source

TAGS = {"user_start_tag": "Question: ", "asst_start_tag": "\nAnswer: ", "asst_end_tag": "\n\n"}
ANSWERS = ["Anna wrote it.", "42 books", '"The River"', "bo", ["(none)", "Anna"]]


@pytest.fixture(scope="module")
def merging():
    """A tokenizer that joins a space with a letter after it, but with no digit or quote."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", letter) for letter in "Ab"]
    words = [*alphabet, *("".join(pair) for pair in merges)]
    raw = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|end|>", pad_token="<|pad|>", bos_token="<|begin|>"
    )


@pytest.mark.parametrize("max_length", [512, 20])
def test_no_prompt_depends_on_the_answer(merging, max_length):
    """Not on how it begins, which moves the border of the scored row, nor on its length."""
    answers = [*ANSWERS, "Anna " * 200]
    rows = [{"question": "Who wrote it?", "answer": answer} for answer in answers]
    config = {"handler": "QADataset", "hf_args": {}, "question_key": "question",
              "answer_key": "answer", "max_length": max_length}  # fmt: skip
    chat = Chat(merging, TAGS)
    source = Source("forget", config, chat, lambda: rows)
    scored = {tuple(row[0].input_ids[: row[0].prompt_length]) for row in source.answers}
    assert len(scored) > 1  # it would
    (prompt,) = {tuple(prompt) for prompt in source.prompts}
    whole = chat.prompt("Who wrote it?")
    assert len(whole) > 20 and list(prompt) == whole[-max_length:]
    assert tuple(whole) in scored or max_length == 20


@pytest.mark.parametrize("max_length", [2048, 12])
def test_no_beginning_of_a_text_depends_on_how_it_goes_on(merging, max_length):
    texts = [*ANSWERS[:-1], "and so on " * 300]
    config = {"handler": "CompletionDataset", "hf_args": {}, "prefix_key": "prompt",
              "text_key": "gt", "max_length": max_length}  # fmt: skip
    for prefix in ("The river was ", "The river"):
        rows = [{"prompt": prefix, "gt": text} for text in texts]
        source = Source("verbmem", config, Chat(merging, TAGS), lambda rows=rows: rows)
        (prompt,) = {tuple(prompt) for prompt in source.prompts}
        if max_length > 12:
            assert merging.decode(prompt) == prefix.rstrip()
            assert len({row[0].prompt_length for row in source.answers}) == 1 + (prefix[-1] == " ")


@pytest.mark.parametrize("most", [100_000, 79])
def test_more_is_to_be_written_than_the_model_reads(merging, most):
    rows = [{"question": "Who?", "answer": "Anna"}]
    config = {"handler": "QADataset", "hf_args": {}, "question_key": "question",
              "answer_key": "answer", "max_new_tokens": most}  # fmt: skip
    merging.model_max_length = 100
    try:
        source = Source("forget", config, Chat(merging, TAGS), lambda: rows)
        with pytest.raises(InputError, match=f"is {most}, but the model reads 100 .* 78 or less"):
            _ = source.prompts
        fits = Source("forget", config | {"max_new_tokens": 78}, Chat(merging, TAGS), lambda: rows)
        assert len(fits.prompts[0]) == 22
    finally:
        merging.model_max_length = 1 << 30


def test_an_empty_answer_still_has_a_prompt(merging):
    rows = [{"question": "Who?", "answer": ""}, {"question": "Who?", "answer": "Anna"}]
    config = {"handler": "QADataset", "hf_args": {}, "question_key": "question",
              "answer_key": "answer"}  # fmt: skip
    source = Source("forget", config, Chat(merging, TAGS), lambda: rows)
    assert source.prompts[0] == source.prompts[1]


def test_plain_text_without_a_prefix_cannot_be_continued(merging):
    config = {"handler": "CompletionDataset", "hf_args": {}, "text_key": "text"}
    source = Source("forget", config, Chat(merging, TAGS), lambda: [{"text": "The river"}])
    with pytest.raises(InputError, match="prefix_key"):
        _ = source.prompts


PEOPLE = [
    {"subject": subject, "level": level, "question": f"Who is {subject}?", "answer": subject}
    for subject, level in (("Anna", 1), ("Ben", 2), ("Anna", 2), ("Cleo", 3))
]


def people(chat, **change):
    config = {"handler": "QADataset", "hf_args": {"path": "people"}, "question_key": "question",
              "answer_key": "answer"} | change  # fmt: skip
    check_source(config, "data", "people")
    return Source("people", config, chat, lambda path: PEOPLE)


@pytest.mark.parametrize(
    "where, kept",
    [
        ({"subject": "Anna"}, [0, 2]),
        ({"subject": ["Cleo", "Anna"]}, [0, 2, 3]),
        ({"subject": "Anna", "level": 2}, [2]),
        ({"level": "2"}, [1, 2]),  # a number in a config may be text in the data
        ({"subject": None}, [0, 1, 2, 3]),
        (None, [0, 1, 2, 3]),
    ],
)
def test_where_keeps_the_rows_with_these_values(merging, where, kept):
    source = people(Chat(merging, TAGS), where=where)
    assert source.rows == [PEOPLE[i] for i in kept]


@pytest.mark.parametrize(
    "where, message",
    [
        ({"subject": "Ana"}, "no row has 'Ana' .* Did you mean 'Anna'. Some of the 3 values there"),
        ({"subject": ["Anna", "Dora"]}, "no row has 'Dora' in its column 'subject'. .*: Anna, Ben"),
        ({"subject": "Anna", "level": 3}, "no row has '3' in its column 'level'"),
        ({"subjet": "Anna"}, "Unknown column 'subjet'. Did you mean 'subject'"),
        ("Anna", "where is 'Anna': it must be columns with the values to keep"),
    ],
)
def test_where_says_what_there_is(merging, where, message):
    with pytest.raises(InputError, match=message):
        people(Chat(merging, TAGS), where=where)


def test_a_question_stands_in_its_format(merging):
    chat = Chat(merging, TAGS)
    plain = people(chat)
    source = people(
        chat,
        question_format="Be brief. {} Now:",
        few_shot_dataset_hf_args={"path": "people"},
        where={"level": 3},
    )
    assert PEOPLE[0]["question"] == "Who is Anna?"  # the data are as they were
    (prompt,) = source.prompt_texts
    # the examples too; its own is not shown, so nothing of it is scored
    assert prompt.count("Be brief. Who is") == 5 and prompt.count("Now:") == 5
    assert [*source.answers] == [[type(plain.answers[0][0])([], [])]]
    other = people(chat, question_format="Be brief. {} Now:")
    assert other.fingerprint([0]) != plain.fingerprint([0])


def test_a_format_without_a_place_for_the_question_is_refused(merging):
    with pytest.raises(InputError, match="it must have {} where the question is to stand"):
        people(Chat(merging, TAGS), question_format="Be brief.")
