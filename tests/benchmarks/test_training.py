"""The benchmark of a step of training, and what ``make bench`` makes of all figures."""

import importlib.util
import json
import os
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from unlora.forward import architecture, outputs
from unlora.objectives import distill
from unlora.trainer import term_losses

FOLDER = Path(__file__).parents[2] / "benchmarks"
NAMES = ("sides", "evaluation_rows", "baseline_training", "training", "builds", "bench")
METHODS = ("NPO", "GradDiff", "SimNPO", "UNDIAL", "RMU")


@pytest.fixture(scope="module")
def scripts():
    """The scripts, which find their neighbours as they do when they are run."""
    found = {}
    for name in NAMES:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        found[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    yield Namespace(**found)
    for name in NAMES:
        del sys.modules[name]


@pytest.fixture(scope="module")
def data(scripts):
    """How a tiny model is asked, and its rows."""
    return scripts.training.data(scripts.training.SIZES["tiny"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of a tied head
@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=[] if name == "NPO" else pytest.mark.slow) for name in METHODS],
)
def test_both_sides_of_a_step_have_the_same_losses(scripts, data, method, tmp_path, monkeypatch):
    monkeypatch.setenv("UNLORA_CACHE", str(tmp_path / "cache"))
    training = scripts.training
    size = training.SIZES["tiny"]
    chat, rows = data
    options = options_of(method)
    found = []
    for make in (training.ours, training.baseline):
        trainer, losses = make(size, chat, rows, str(tmp_path / make.__name__), options)
        trainer.args.max_steps = 2
        trainer.train()
        found.append(losses())
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0] != 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of a tied head
@pytest.mark.parametrize("left_out", ["known", "packs", "flat", "fused", "joined", "positions",
                                      "chunks", "in-place", "layers", "shared"])  # fmt: skip
def test_a_step_without_one_of_its_parts_has_the_same_losses(
    scripts, data, left_out, tmp_path, monkeypatch
):
    for module, name in (
        (term_losses, "precompute"), (term_losses, "as_reference"),
        (outputs, "_before_the_head"), (outputs, "_ending_after"), (distill, "_cross_entropy"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, getattr(module, name))  # put back after the test
    training, (method, _) = scripts.training, scripts.bench.WITHOUT[left_out]
    size = training.SIZES["tiny"]
    chat, rows = data
    found, passes = [], []
    for leaves_out in (False, True):
        folder = str(tmp_path / str(leaves_out))
        monkeypatch.setenv("UNLORA_CACHE", f"{folder}/cache")
        trainer, losses = training.ours(size, chat, rows, folder, options_of(method))
        if left_out in training.RESTS_ON:
            training.WITHOUT[training.RESTS_ON[left_out]](trainer)
        if leaves_out:
            training.WITHOUT[left_out](trainer)
        passes.append(watched(trainer.model))
        trainer.args.max_steps = 2
        trainer.train()
        found.append(losses())
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] != 0
    if left_out == "in-place":
        assert distill._cross_entropy.__module__ == "training"
    elif left_out == "fused":
        assert not any("forward" in vars(module) for module in trainer.model.modules())
    else:
        assert passes[0] != passes[1]


def watched(model):
    """What the last layer and the head of a model answer, by shape, of all passes to come."""
    seen = []
    for module in (architecture.decoder_layers(model)[-1], architecture.output_embedding(model)):
        module.register_forward_hook(lambda _m, _args, said: seen.append(tuple(said[0].shape)))
    return seen


def options_of(method):
    return Namespace(
        method=method, rank=4, device="cpu", dtype="float32", threads=0, overrides=[],
        careful=False,
    )  # fmt: skip


def test_a_careful_baseline_has_the_losses_of_the_other(scripts):
    logits, labels = torch.randn(3, 9, 20), torch.randint(20, (3, 9))
    labels[:, :4], labels[0, 7:] = -100, -100
    of = scripts.baseline_training
    expected = of.row_losses(logits, labels)
    torch.testing.assert_close(of.careful_row_losses(logits, labels), expected)


def test_a_side_answers_what_it_is_told_and_ends_when_nobody_tells(scripts, tmp_path):
    script = tmp_path / "side.py"
    script.write_text(
        "import sys\nsys.path.insert(0, sys.argv[1])\nfrom sides import say\n"
        "for line in sys.stdin:\n    if line == 'fail\\n':\n        break\n"
        "    print('other')\n    say({'told': line})\n"
        "open(sys.argv[2], 'w').close()\n"
    )
    ended = tmp_path / "ended"
    with scripts.sides.Side(script, [str(FOLDER), str(ended)], os.environ) as side:
        assert side.tell("one") == {"told": "one\n"} and side.tell("two") == {"told": "two\n"}
        assert not ended.exists()
    assert ended.exists() and side.process.returncode == 0
    with scripts.sides.Side(script, [str(FOLDER), str(ended)], os.environ) as side:
        for _ in range(2):  # one that has ended is told to in vain
            with pytest.raises(SystemExit, match="side.py .* ended with 0"):
                side.tell("fail")


def test_the_floor_counts_what_cannot_be_left_out(scripts):
    training = scripts.training
    size = training.Size(8, 16, 2, 2, 1, 32, "")
    seen = {"forget": {"tokens": 10, "scored": 4, "squares": 0}}
    # 2 layers of q, o: 8 x 8; k, v: 8 x 4; gate, up, down: 8 x 16; and a head of 8 x 32
    layer = 2 * 64 + 2 * 32 + 3 * 128
    frozen = 2 * 10 * layer + 4 * 256
    rank_1 = 2 * 10 * (2 * 16 + 2 * 12 + 3 * 24) + 4 * 40
    assert training.count_flops(size, 1, "NPO", seen) == 2 * (2 * frozen + 3 * rank_1)
    # RMU sees the first layer alone, and no head
    frozen, rank_1 = 10 * layer, 10 * (2 * 16 + 2 * 12 + 3 * 24)
    assert training.count_flops(size, 1, "RMU", seen) == 2 * (2 * frozen + 3 * rank_1)


def one(workload, name, value, target=None, **about):
    row = {"workload": workload, "figure": name, "value": value, "target": target}
    met = None if target is None else value >= target
    return row | {"met": met, "command": "python x.py", "machine": "2 cores", **about}


def test_figures_that_are_measured_again_take_the_place_of_the_old(scripts):
    old = [one("S", "times as fast", 2.0, 3.0), one("M", "times as fast", 4.0)]
    new = [one("S", "times as fast", 3.5, 3.0)]
    merged = scripts.bench.kept(old, new)
    assert [(x["workload"], x["value"]) for x in merged] == [("S", 3.5), ("M", 4.0)]


def test_the_page_has_a_table_for_each_kind_of_machine_and_keeps_its_words(scripts):
    page = "Words.\n<!-- cpu -->\nold\n<!-- /cpu -->\nMore.\n<!-- gpu -->\n<!-- /gpu -->\nEnd.\n"
    missed = one("S NPO", "times as fast", 2.0, 3.0)
    text = scripts.bench.written(page, [missed])
    assert "old" not in text and text.startswith("Words.") and text.endswith("End.\n")
    assert "| S NPO | times as fast | 2 | ≥ 3 | **missed** |" in text and "`python x.py`" in text
    assert "<!-- gpu -->\nNot measured.\n<!-- /gpu -->" in text
    on_gpu = one("3B NPO r 16", "tokens a second", 1363.2, machine="a GPU")
    text = scripts.bench.written(text, [missed, on_gpu])
    assert "| 3B NPO r 16 | tokens a second | 1363 |  |  |" in text and "On a GPU:" in text
    assert scripts.bench.written(text, [missed, on_gpu]) == text


def test_a_part_that_does_not_exist_is_named(scripts, capsys):
    with pytest.raises(SystemExit):
        scripts.bench.main(["--only", "XL"])
    assert "There is no part 'XL'. Parts: R, R-today, S, " in capsys.readouterr().err


def test_without_a_real_model_its_part_is_left_out(scripts, monkeypatch, capsys):
    monkeypatch.delenv("UNLORA_REAL_MODEL", raising=False)
    assert scripts.bench.real() == []
    assert "set UNLORA_REAL_MODEL" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "nowhere"], "There is no model in 'nowhere'. Give --model FOLDER"),
        (["--model", "HERE"], "Give --against FOLDER of another checkout"),
        (["--model", "HERE", "--against", "HERE", "--work", "NPO"], "There is no work NPO. Known"),
    ],
)
def test_what_builds_cannot_compare_is_said(
    scripts, arguments, message, tmp_path, monkeypatch, capsys
):
    (tmp_path / "src").mkdir()
    (tmp_path / "config.json").touch()
    arguments = [str(tmp_path) if argument == "HERE" else argument for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["builds.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        scripts.builds.parsed()
    assert message in f"{stopped.value}{capsys.readouterr().err}"


def test_another_checkout_is_found_as_the_package(scripts):
    with scripts.builds.package(FOLDER.parent) as folder:
        assert (Path(folder) / "unlora" / "__main__.py").is_file()
        assert (Path(folder) / "unlora" / "configs" / "unlearn.yaml").is_file()


def test_the_figures_that_are_kept_are_whole():
    figures = json.loads((FOLDER / "results" / "latest.json").read_text("utf-8"))
    wanted = {"workload", "figure", "value", "target", "met", "command", "machine"}
    assert figures and all(set(row) == wanted for row in figures)
