"""Where the answer stands in a conversation, whatever a template writes around it.

``UPDATE_GOLDEN=1 pytest tests/data/test_template.py`` writes ``golden/thinking_templates.txt``.
"""

import os
from pathlib import Path

import pytest
from tiny import tokenizer as byte_tokenizer
from token_tables import table, words

from unlora.data.chat_encoding import Chat
from unlora.data.template import Turns
from unlora.errors import InputError
from unlora.forward import IGNORE_INDEX

GOLDEN = Path(__file__).parent / "golden" / "thinking_templates.txt"
QUESTION, ANSWER = "Who wrote it?", "Ana Silva wrote it."
TURN = "{% for m in messages %}{% if m.role == 'assistant' %}"
OTHERS = "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
ASKED = "{% if add_generation_prompt %}"
CLOSED = "<think>\n\n</think>\n\n"
# small templates of the shapes that families of 2025 and 2026 have
SHAPES = {
    # Qwen3: the whole conversation has a closed thought, the generation prompt has none
    "closed in the conversation": (
        TURN + "<|im_start|>assistant\n" + CLOSED + "{{ m.content }}<|im_end|>\n" + OTHERS + ASKED
        + "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
        + CLOSED + "{% endif %}{% endif %}"
    ),
    # Qwen3.5: the generation prompt opens a thought, the conversation has it closed
    "opened by the prompt": (
        TURN + "<|im_start|>assistant\n" + CLOSED + "{{ m.content }}<|im_end|>\n" + OTHERS + ASKED
        + "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
        + CLOSED + "{% else %}<think>\n{% endif %}{% endif %}"
    ),
    # R1: the generation prompt opens a thought, the conversation has none
    "opened and left out": (
        TURN + "<|im_start|>assistant\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n" + OTHERS
        + ASKED + "<|im_start|>assistant\n<think>\n{% endif %}"
    ),
    # SmolLM3: a mode in the system prompt
    "a mode": (
        "{% set mode = '/think' if enable_thinking | default(true) else '/no_think' %}"
        "<|im_start|>system\n{{ mode }}<|im_end|>\n" + TURN
        + "<|im_start|>assistant\n{% if mode == '/no_think' %}" + CLOSED + "{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n" + OTHERS + ASKED
        + "<|im_start|>assistant\n{% endif %}"
    ),
    # gpt-oss: channels
    "channels": (
        TURN + "<|im_start|>assistant<|channel|>final<|message|>{{ m.content }}<|im_end|>" + OTHERS
        + ASKED + "<|im_start|>assistant{% endif %}"
    ),
    "no generation prompt": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    ),
    # Llama-2: a space on both sides of the answer
    "spaces": (
        TURN + " {{ m.content }} <|im_end|>{% else %}[INST] {{ m.content }} [/INST]{% endif %}"
        "{% endfor %}"
    ),
    "trims": (
        TURN + "<|im_start|>assistant\n{{ m.content | trim }}<|im_end|>\n" + OTHERS
        + ASKED + "<|im_start|>assistant\n{% endif %}"
    ),
}  # fmt: skip
MARKS = ["<think>", "</think>", "<|channel|>", "<|message|>"]
MODES = {"as it is": {}, "with thoughts": {"enable_thinking": True},
         "without": {"enable_thinking": False}}  # fmt: skip


def tokenizer_of(shape):
    special = ["<|im_start|>", "<|im_end|>"]
    fast = words(None, "<|endoftext|>", "<|endoftext|>", special)
    fast.add_tokens(MARKS)  # as in Qwen3, they are no special tokens
    fast.chat_template = SHAPES[shape]
    return fast


def chat_of(shape, **kwargs):
    args = {"apply_chat_template": True, "chat_template_kwargs": kwargs}
    return Chat(tokenizer_of(shape), args)


def modes_of(shape):
    knows = "enable_thinking" in SHAPES[shape] or "think" in SHAPES[shape] or shape == "channels"
    return MODES if knows else {"as it is": {}}


CASES = [(shape, mode) for shape in SHAPES for mode in modes_of(shape)]


def test_tables_of_templates_that_think():
    pages = []
    for shape, mode in CASES:
        chat = chat_of(shape, **MODES[mode])
        row, prompt = chat.encode(QUESTION, ANSWER), chat.prompt(QUESTION)
        page = f"## {shape}, {mode}\n{table(chat.tokenizer, row)}\n"
        if prompt != row.input_ids[: row.prompt_length]:
            page += f"gone on from: {chat.tokenizer.decode(prompt)!r}\n"
        pages.append(page)
    text = "\n".join(pages)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text, "utf-8")
    assert text == GOLDEN.read_text("utf-8")


@pytest.mark.parametrize("shape, mode", CASES)
def test_a_row_is_the_whole_conversation_as_the_template_writes_it(shape, mode):
    chat = chat_of(shape, **MODES[mode])
    row = chat.encode(QUESTION, ANSWER)
    told = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    whole = chat.tokenizer.apply_chat_template(told, tokenize=False, **MODES[mode])
    assert chat.tokenizer.decode(row.input_ids) == whole.rstrip("\n")
    scored = chat.tokenizer.decode([i for i in row.labels if i != IGNORE_INDEX])
    assert scored.removesuffix("<|im_end|>").strip() == ANSWER


@pytest.mark.parametrize("shape", [s for s in SHAPES if len(modes_of(s)) > 1])
def test_only_who_is_to_think_goes_on_from_the_prompt_of_the_template(shape):
    asked = [{"role": "user", "content": QUESTION}]
    for mode, kwargs in MODES.items():
        chat = chat_of(shape, **kwargs)
        prompt, row = chat.prompt(QUESTION), chat.encode(QUESTION, ANSWER)
        own = chat.tokenizer.apply_chat_template(
            asked, tokenize=False, add_generation_prompt=True, **kwargs
        )
        if mode == "with thoughts":
            assert chat.tokenizer.decode(prompt) == own
        else:
            assert prompt == row.input_ids[: row.prompt_length]


@pytest.mark.parametrize(
    "shape, written, answer",
    [
        ("closed in the conversation", "Ana Silva", "Ana Silva"),
        ("closed in the conversation", "<think>\nWho?\n</think>\n\nAna", "Ana"),
        ("closed in the conversation", "\n<think>\nWho?", None),
        ("opened by the prompt", "Who?\n</think>\n\nAna", "Ana"),
        ("opened by the prompt", "Who? Ana", None),
        ("opened by the prompt", "Who?</think> A </think>Ana", "Ana"),
        ("opened and left out", "<think> Ana </think>", ""),
        ("channels", "<|channel|>final<|message|>Ana", "Ana"),
        ("channels", "<|channel|>system<|message|>Who<|channel|>final<|message|>Ana", "Ana"),
        ("channels", "<|channel|>system<|message|>Ana", None),
        ("no generation prompt", "<think> Ana", "<think> Ana"),
    ],
)
def test_a_thought_is_no_part_of_the_answer(shape, written, answer):
    chat = chat_of(shape, **(MODES["with thoughts"] if len(modes_of(shape)) > 1 else {}))
    ids = chat.tokenizer(written, add_special_tokens=False).input_ids
    rest = chat.without_thought(ids)
    assert (rest if rest is None else chat.tokenizer.decode(rest).strip()) == answer


def test_a_thought_without_tokens_of_its_own_is_found_too():
    """In bytes, and with a sign behind it that is one token with its end elsewhere."""
    fast = byte_tokenizer()
    fast.chat_template = SHAPES["opened and left out"]
    chat = Chat(fast, {"apply_chat_template": True})
    ids = fast("<think>\nÄh\n</think>\n\nÄh, Ana", add_special_tokens=False).input_ids
    assert fast.decode(chat.without_thought(ids)) == "\n\nÄh, Ana"


def test_white_space_of_an_answer_is_as_the_template_has_it():
    for shape, scored in (("trims", ANSWER), ("channels", f" {ANSWER}\n")):
        chat = chat_of(shape)
        row = chat.encode(QUESTION, f" {ANSWER}\n")
        found = chat.tokenizer.decode(row.input_ids[row.prompt_length :])
        assert found == f"{scored}<|im_end|>"


def test_what_was_said_before_is_a_conversation_too():
    chat = chat_of("closed in the conversation")
    asked = Turns("When?", ((QUESTION, ANSWER),), "You are Ana")
    text = chat.tokenizer.decode(chat.encode(asked, "2025").input_ids)
    assert text.startswith("<|im_start|>system\nYou are Ana<|im_end|>\n<|im_start|>user\nWho wrote")
    shown = chat.encode("When?", "2025", examples=[(QUESTION, ANSWER)])
    assert chat.tokenizer.decode(shown.input_ids) == text.partition("<|im_end|>\n")[2]


SCORED = "{{ m.content }}<|im_end|>\n"
REFUSED = {
    # what a template does, the template, variables, what is said
    "includes": ("{% include 'x' %}", {}, "cannot be used"),
    "counts too far": ("{% for i in range(999999999) %}{% endfor %}", {}, "Range too big"),
    "raises": ("{{ raise_exception('no chat') }}", {}, r"cannot be used \(no chat\)"),
    "divides by zero": ("{{ 1 / 0 }}", {}, "division by zero"),
    "is broken": ("{% if %}", {}, "cannot be used"),
    "calls what is not there": ("{{ ask() }}", {}, "'ask' is undefined"),
    "adds a number to text": ("{{ messages[0].content + 1 }}", {}, "cannot be used"),
    "leaves out the user": (TURN + SCORED + "{%- endif %}{%- endfor %}", {}, "what the user says"),
    "leaves out the assistant": ("{{ messages[0].content }}", {}, "what the assistant says"),
    "capitals": ("{% for m in messages %}{{ m.content | lower }}{% endfor %}", {}, "the user says"),
    "wants parts": (
        "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}", {},
        "cannot be used"),
    "answers in thoughts": (
        "{% for m in messages %}{{ m.role }}<think>{{ m.content }}{% if false %}</think>{% endif %}"
        "{% endfor %}", {}, "it puts the answer into a thought"),
    "a variable that is mistyped": (
        SHAPES["a mode"], {"enable_thinkin": True}, "Did you mean 'enable_thinking'"),
    "a variable that nobody reads": (
        SHAPES["no generation prompt"], {"enable_thinking": False}, "Unknown variable of the chat"),
    "a variable of another type": (
        SHAPES["a mode"], {"enable_thinking": "false"}, "is 'false'; it must be true or false"),
    "a variable of ours": (
        SHAPES["a mode"], {"add_generation_prompt": True}, "is set by this program itself"),
    "messages of its own": (SHAPES["a mode"], {"messages": []}, "is set by this program itself"),
}  # fmt: skip


@pytest.mark.parametrize("template, kwargs, said", REFUSED.values(), ids=REFUSED)
def test_a_template_that_cannot_be_used_is_one_sentence(template, kwargs, said):
    fast = byte_tokenizer()
    fast.chat_template = template
    with pytest.raises(InputError, match=said) as error:
        Chat(fast, {"apply_chat_template": True, "chat_template_kwargs": kwargs})
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_variable_changes_what_answers_are_kept_under():
    found = {chat_of("a mode", **kwargs).fingerprint for kwargs in MODES.values()}
    assert len(found) == 3
