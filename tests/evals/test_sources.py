"""What a suite asks about is what its config says, and generation continues what is scored."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from unlora.data.chat import Chat
from unlora.errors import InputError
from unlora.evals.sources import Source

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


def scored_prompts(source):
    first = [answers[0] for answers in source.answers]
    return [row.input_ids[: row.prompt_length] for row in first]


@pytest.mark.parametrize("max_length", [512, 20])
def test_generation_and_scoring_see_the_same_prompt(merging, max_length):
    rows = [{"question": "Who wrote it?", "answer": answer} for answer in ANSWERS]
    config = {"handler": "QADataset", "hf_args": {}, "question_key": "question",
              "answer_key": "answer", "max_length": max_length}  # fmt: skip
    chat = Chat(merging, TAGS)
    source = Source("forget", config, chat, lambda: rows)
    assert source.prompts == scored_prompts(source)
    assert len({tuple(prompt) for prompt in source.prompts}) > 1  # the answer moves the border
    assert all(len(prompt) < max_length for prompt in source.prompts)
    assert (chat.prompt("Who wrote it?") in source.prompts) == (max_length == 512)


@pytest.mark.parametrize("max_length", [2048, 12])
def test_a_continued_text_has_one_prompt_too(merging, max_length):
    rows = [{"prompt": "The river was ", "gt": text} for text in ANSWERS[:-1]]
    rows += [{"prompt": "The river", "gt": "was blue"}]
    config = {"handler": "CompletionDataset", "hf_args": {}, "prefix_key": "prompt",
              "text_key": "gt", "max_length": max_length}  # fmt: skip
    source = Source("verbmem", config, Chat(merging, TAGS), lambda: rows)
    assert source.prompts == scored_prompts(source)
    assert len({tuple(prompt) for prompt in source.prompts}) > 2
    assert all(len(prompt) < max_length for prompt in source.prompts)


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
