"""What is read and what is scored, for every shipped template.

``golden/templates.txt`` is written by ``UPDATE_GOLDEN=1 pytest tests/data/test_chat_encoding.py``.
"""

import os
from pathlib import Path

import pytest
import token_tables
import yaml
from tiny import tokenizer as byte_tokenizer
from token_tables import table
from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from unlora.data.chat_encoding import Chat
from unlora.data.text import encode_text
from unlora.errors import InputError
from unlora.evals.datasets import Source
from unlora.forward import IGNORE_INDEX

TEMPLATES = Path(__file__).parents[2] / "configs" / "template"
GOLDEN = Path(__file__).parent / "golden" / "templates.txt"
QUESTION, ANSWER = "Who wrote it?", "Ana Silva wrote it."
TURN = "{% for m in messages %}"
# how each family's own chat template lays out a conversation
FAMILIES = {
    "qwen": (
        TURN + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama3": (
        "<|begin_of_text|>" + TURN + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{% if m.role == 'system' %}Today {{ date_string }}\n\n{% endif %}{{ m.content }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "phi3": (
        TURN + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
    ),
    "gemma": (
        "<bos>" + TURN + "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "zephyr": (
        TURN + "<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "pocket": (
        TURN + "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "smollm2": (
        TURN + "{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a helpful AI "
        "assistant named SmolLM, trained by Hugging Face<|im_end|>\n{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "olmo2": (
        "{{ bos_token }}" + TURN + "<|{{ m.role }}|>\n{{ m.content }}{% if m.role == 'assistant' %}"
        "{{ eos_token }}{% endif %}{% if m.role != 'assistant' or not loop.last %}{{ '\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}" + TURN + "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
        "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
    ),
    "phi4-mini": (
        TURN + "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
    ),
    "llama2-chat": None,
    "question-answer": None,
}
SPECIAL = {
    "qwen": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "phi3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "zephyr": ["<|system|>", "<|user|>", "<|assistant|>"],
    "pocket": ["<|user|>", "<|assistant|>"],
    "smollm2": ["<|im_start|>", "<|im_end|>"],
    "olmo2": ["<|user|>", "<|assistant|>"],  # text in its own tokenizer
    "mistral": ["[INST]", "[/INST]"],
    "phi4-mini": ["<|user|>", "<|assistant|>", "<|end|>"],
}
# family -> begin, end of sequence, pad; in some families the pad is the end of an answer
ENDS = {
    "qwen": (None, "<|endoftext|>", "<|endoftext|>"),
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    "phi3": ("<s>", "<|endoftext|>", "<|endoftext|>"),
    "gemma": ("<bos>", "<eos>", "<pad>"),
    "pocket": (None, "<|end|>", "<|pad|>"),
    "smollm2": ("<|im_start|>", "<|im_end|>", "<|im_end|>"),
    "olmo2": ("<|endoftext|>", "<|endoftext|>", "<|pad|>"),
    "phi4-mini": ("<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
}


def words(family):
    """A tokenizer with one token for each word or sign, so that the tables can be read."""
    begin, end, pad = ENDS.get(family, ("<s>", "</s>", "</s>"))
    fast = token_tables.words(begin, end, pad, SPECIAL.get(family, []))
    fast.chat_template = FAMILIES[family]
    return fast


def template_args(family):
    return yaml.safe_load((TEMPLATES / f"{family}.yaml").read_text())


def variants():
    for family in FAMILIES:
        modes = [True, False] if FAMILIES[family] else [False]
        for chat in modes:
            if chat or "user_start_tag" in template_args(family):
                yield family, chat


def test_every_shipped_template_is_in_the_table():
    assert {file.stem for file in TEMPLATES.glob("*.yaml")} == set(FAMILIES)


def test_templates_score_the_answer_and_one_end_token():
    pages = []
    for family, chat in variants():
        tokenizer = words(family)
        args = {**template_args(family), "apply_chat_template": chat}
        row = Chat(tokenizer, args).encode(QUESTION, ANSWER)
        how = "chat template" if chat else "tags"
        pages.append(f"## {family}, {how}\n{table(tokenizer, row)}\n")
    text = "\n".join(pages)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text, "utf-8")
    assert text == GOLDEN.read_text("utf-8")


@pytest.mark.parametrize("family, chat", list(variants()))
def test_what_is_scored_is_the_answer_and_exactly_one_end_token(family, chat):
    tokenizer = words(family)
    encoder = Chat(tokenizer, {**template_args(family), "apply_chat_template": chat})
    row = encoder.encode(QUESTION, ANSWER)
    scored = [label for label in row.labels if label != IGNORE_INDEX]
    assert scored == row.input_ids[row.prompt_length :], "scored to the end without a gap"
    assert tokenizer.decode(scored[:-1]).strip() == ANSWER
    assert scored[-1] == encoder.end_id and encoder.end_id not in scored[:-1]
    begin = tokenizer.bos_token_id
    if begin is not None:
        # where a turn begins with it, each does
        assert row.input_ids[: row.prompt_length].count(begin) <= (3 if family == "smollm2" else 1)
    assert encoder.prompt(QUESTION) == row.input_ids[: row.prompt_length]


@pytest.mark.parametrize("family, chat", list(variants()))
def test_training_and_generation_see_the_same_prompt_with_examples(family, chat):
    encoder = Chat(words(family), {**template_args(family), "apply_chat_template": chat})
    shown = [("Who wrote it?", "Ana.")]
    row = encoder.encode(QUESTION, ANSWER, examples=shown)
    assert encoder.prompt(QUESTION, examples=shown) == row.input_ids[: row.prompt_length]
    assert row.prompt_length > encoder.encode(QUESTION, ANSWER).prompt_length


def ask(encoder, answer):
    """The prompt of a generation, where the data have this answer."""
    rows = [{"question": QUESTION, "answer": answer}]
    config = {"handler": "QADataset", "hf_args": {}, "question_key": "question",
              "answer_key": "answer"}  # fmt: skip
    return Source("forget", config, encoder, lambda: rows).prompts[0]


ODD = ["Ana", "42", "1950", '"The River"', "(none)", "$5", "[x]", "李白", "東京", "é", "-", " x"]


@pytest.mark.parametrize("family, chat", list(variants()))
def test_no_prompt_depends_on_the_answer(family, chat):
    encoder = Chat(words(family), {**template_args(family), "apply_chat_template": chat})
    assert len({tuple(ask(encoder, answer)) for answer in ODD}) == 1


def test_an_answer_that_merges_with_the_prompt_loses_no_token():
    """Tokenised apart, ``": "`` and ``"it"`` are not the tokens of ``": it"``."""
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(":, itq")} | {" i": 6, " it": 7},
                               merges=[(" ", "i"), (" i", "t")]))  # fmt: skip
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="</s>")
    chat = Chat(fast, {"user_start_tag": "q", "user_end_tag": ": "})
    row = chat.encode("i", "it")
    assert fast.tokenize("qi: ")[-1] == " " and fast.tokenize("it") == ["i", "t"]
    kept = [i for i in row.labels if i != IGNORE_INDEX]
    assert fast.convert_ids_to_tokens(kept) == [" it", "</s>"]


def long_row(question, answer, max_length):
    return Chat(byte_tokenizer(), {"user_end_tag": ":"}).encode(
        question, answer, max_length=max_length
    )


def text_of(row):
    return byte_tokenizer().decode(row.input_ids)


def test_a_long_prompt_keeps_its_end_and_the_whole_answer():
    row = long_row("x" * 50 + "why", "because", 20)
    assert text_of(row) == "xxxxxxxx" + "why:" + "because" + "<|end|>" and row.cut == 42


def test_a_long_answer_keeps_the_question_and_its_beginning():
    row = long_row("why", "because " * 9, 20)
    assert text_of(row) == "why:" + "because because " and row.cut == 57


def test_both_too_long_share_the_room():
    row = long_row("x" * 50, "y" * 50, 20)
    assert text_of(row) == "x" * 9 + ":" + "y" * 10


def test_the_begin_token_stays_when_a_prompt_is_cut():
    tokenizer = words("llama2-chat")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    chat = Chat(tokenizer, template_args("llama2-chat"))
    whole = chat.encode("Ana " * 30, ANSWER)
    cut = chat.encode("Ana " * 30, ANSWER, max_length=30)
    assert whole.input_ids[0] == cut.input_ids[0] == tokenizer.bos_token_id
    assert len(cut.input_ids) == 30 and cut.input_ids[1:] == whole.input_ids[-29:]


def test_an_empty_answer_is_refused():
    with pytest.raises(InputError, match="The answer to 'why' is empty"):
        long_row("why", " ", 20)


def test_a_chat_template_that_is_not_there_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="has no chat template"):
        Chat(tokenizer, {"apply_chat_template": True})


def test_running_text_scores_everything_but_its_prefix():
    row = encode_text(Chat(byte_tokenizer(), {}).control, "world", prefix="hello ", max_length=100)
    assert [i for i in row.labels if i != IGNORE_INDEX] == byte_tokenizer()("world").input_ids


def test_real_tokenizers(realdata):
    args = template_args("qwen")
    qwen = AutoTokenizer.from_pretrained(realdata / "tokenizers" / "qwen2.5-7b-instruct")
    row = Chat(qwen, args).encode(QUESTION, ANSWER)
    scored = [i for i in row.labels if i != IGNORE_INDEX]
    assert qwen.convert_ids_to_tokens(scored)[-1] == "<|im_end|>"
    assert qwen.decode(scored[:-1]) == ANSWER
    assert qwen.decode(row.input_ids[: row.prompt_length]) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nWho wrote it?<|im_end|>\n<|im_start|>assistant\n"
    )
    llama = AutoTokenizer.from_pretrained(realdata / "tokenizers" / "llama-2-7b-chat-hf")
    llama.pad_token = llama.eos_token
    row = Chat(llama, template_args("llama2-chat")).encode(QUESTION, ANSWER)
    assert row.input_ids[0] == llama.bos_token_id and row.input_ids.count(llama.bos_token_id) == 1
    scored = [i for i in row.labels if i != IGNORE_INDEX]
    assert scored[-1] == llama.eos_token_id and scored.count(llama.eos_token_id) == 1
    assert llama.decode(scored[:-1]).strip() == ANSWER


def test_no_prompt_of_a_real_tokenizer_depends_on_the_answer(realdata):
    llama = AutoTokenizer.from_pretrained(realdata / "tokenizers" / "llama-2-7b-chat-hf")
    for family, end in (("question-answer", "Answer:"), ("llama2-chat", "[/INST]")):
        chat = Chat(llama, template_args(family))
        scored = [chat.encode(QUESTION, answer) for answer in ODD]
        borders = {tuple(row.input_ids[: row.prompt_length]) for row in scored}
        assert len(borders) > 1, "the scored row keeps its own border"
        (prompt,) = {tuple(ask(chat, answer)) for answer in ODD}
        assert llama.decode(prompt).endswith(end)
        assert prompt == borders_of_letters(chat)


def borders_of_letters(chat):
    row = chat.encode(QUESTION, ANSWER)
    return tuple(row.input_ids[: row.prompt_length])
