"""A person talks to the target and the unlearned model, and nothing from either obeys."""

import argparse
import io
import unicodedata

import pytest
import tiny
import torch

from unlora.cli import chat
from unlora.cli.chat import Speaker, cells_of, printable, side_by_side, talk, wrapped
from unlora.cli.main import main
from unlora.model import get_model
from unlora.model.lora import save_adapter

TEMPLATE = {"apply_chat_template": True}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A root, a model that was fine-tuned from it, and one that was unlearned from that."""
    folder = tmp_path_factory.mktemp("saves")
    tiny.llama().save_pretrained(folder / "root")
    tiny.tokenizer().save_pretrained(folder / "root")
    for seed, (below, run) in enumerate((("root", "target"), ("target", "forgot"))):
        section = {
            "model_args": {"pretrained_model_name_or_path": str(folder / below)},
            "template_args": TEMPLATE,
            "use_lora": True,
            "lora_config": tiny.LORA,
        }
        model, tokenizer = get_model(section)
        torch.manual_seed(seed)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(std=0.3)
        save_adapter(model, folder / run)
        tokenizer.save_pretrained(folder / run)
    return folder


def options(*runs, **more):
    settings = {"temperature": 0.0, "max_new_tokens": 6, "seed": 0} | more
    return argparse.Namespace(runs=[str(run) for run in runs], **settings)


def said(folder):
    (speaker,) = [x for x in chat._speakers(options(folder)) if x.name == str(folder)]
    return speaker.answer("Who?")


@pytest.mark.slow
def test_target_and_unlearned_model_speak_from_one_base(runs, monkeypatch):
    alone = [said(runs / name) for name in ("root", "target", "forgot")]
    assert len({*alone}) == 3
    loaded = []
    from unlora.model import model_registry

    load = model_registry.load_model
    monkeypatch.setattr(model_registry, "load_model", lambda *a: loaded.append(a) or load(*a))
    before, after = chat._speakers(options(runs / "forgot"))
    assert before.name.endswith("target") and after.name.endswith("forgot")
    assert [before.answer("Who?"), after.answer("Who?"), before.answer("Who?")] == [
        alone[1], alone[2], alone[1],
    ]  # fmt: skip
    assert len(loaded) == 1


@pytest.mark.slow
def test_one_adapter_stands_beside_its_root(runs):
    before, after = chat._speakers(options(runs / "target"))
    assert before.answer("Who?") == said(runs / "root") != after.answer("Who?")


@pytest.mark.slow
def test_sampling_is_seeded_and_differs_from_the_likeliest(runs):
    def ask(**more):
        *_, speaker = chat._speakers(options(runs / "forgot", max_new_tokens=20, **more))
        return speaker.answer("Who?")

    assert ask(temperature=2.0) == ask(temperature=2.0)
    assert ask(temperature=2.0) != ask(temperature=2.0, seed=1)
    assert ask() == ask(seed=1)


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(runs, monkeypatch):
    *_, speaker = chat._speakers(options(runs / "forgot", max_new_tokens=20))
    whole = speaker.answer("Who?")
    model = speaker.answer.args[0]
    generate = type(model.base_model.model).forward
    steps = []

    def forward(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(type(model.base_model.model), "forward", forward)
    cut = speaker.answer("Who?")
    assert cut.endswith(" [ended]") and whole.startswith(cut.removesuffix(" [ended]")[:3])


def test_lines_that_are_piped_in_are_answered_in_order(runs, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Who?\n\n/what\n/help\nWhy?\n/quit\nNever\n"))
    main(["chat", str(runs / "forgot"), "--max-new-tokens", "3"])
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith(">")] == ["> Who?", "> Why?"]
    assert "Unknown /what. Type /help" in out and "Ctrl-D" in out
    assert out.count("before: ") == 2


def test_the_end_of_the_input_is_the_end():
    out = io.StringIO()
    talk([Speaker("a", str.upper)], io.StringIO("hello"), out)
    assert out.getvalue() == "> hello\na\n─\nHELLO\n\n"


HOSTILE = {
    "\x1b[2J\x1b]0;title\x07": "\\x1b[2J\\x1b]0;title\\x07",
    "a\rb": "a\\rb",
    "\x9b31m": "\\x9b31m",
    "\u202eabc": "\\u202eabc",
    "a\r\nb\tc": "a\nb    c",
    "\u2028": "\\u2028",
    "ok 你好 é": "ok 你好 é",
}


@pytest.mark.parametrize("text, shown", HOSTILE.items())
def test_what_a_terminal_would_obey_is_shown_as_text(text, shown):
    assert printable(text) == shown


def test_nothing_a_model_or_a_name_holds_reaches_the_terminal_raw():
    everything = "".join(map(chr, range(0x300)))
    out = side_by_side([everything, "b"], ["b", everything], 60)
    assert {unicodedata.category(sign) for sign in out if sign != "\n"}.isdisjoint({"Cc", "Cf"})


@pytest.mark.parametrize(
    "text", ["word " * 30, "x" * 200, "你好世界" * 20, "é" * 50, "ab\n\ncd 你"]
)
@pytest.mark.parametrize("width", [40, 41, 80, 200])
def test_columns_keep_to_the_width(text, width):
    lines = side_by_side(["one", "two"], [text, "short"], width).splitlines()
    assert max(map(cells_of, lines)) <= width
    bars = {cells_of(line[: line.index("│")]) for line in lines if "│" in line}
    assert len(bars) == 1  # the second column begins at the same cell in every line


def test_wide_signs_take_two_cells_and_accents_none():
    assert [cells_of(text) for text in ("ab", "你好", "e\u0301")] == [2, 4, 1]
    assert wrapped("你好世界", 5) == ["你好", "世界"]
    assert wrapped("a bc def", 4) == ["a bc", "def"]


def test_where_there_is_no_room_answers_stand_below_each_other():
    assert "│" not in side_by_side(["one", "two"], ["a", "b"], 20)
    assert "│" in side_by_side(["one", "two"], ["a", "b"], 60)


WRONG = {
    "no model": ("", "Talk to which model? Type: unlora chat"),
    "no such folder": ("saves/unlearn/nowhere", "There is no folder 'saves/unlearn/nowhere'."),
    "no run": ("empty", "holds no model"),
    "unknown flag": ("empty --temprature 1", "cannot use '--temprature'"),
    "no number": ("empty --temperature hot", "invalid float value: 'hot'"),
    "a negative number": ("empty --temperature -1", "a number of at least 0"),
    "no tokens": ("empty --max-new-tokens 0", "the second at least 1"),
}


@pytest.mark.parametrize("typed, says", WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_sentence(tmp_path, monkeypatch, capsys, typed, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as left:
        main(["chat", *typed.split()])
    assert left.value.code == 2
    out, err = capsys.readouterr()
    assert says in err and err.count("\n") == 1 and out == ""
