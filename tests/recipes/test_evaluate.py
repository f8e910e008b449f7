"""The entry point of an evaluation: what it prints, and when it needs the model at all."""

import json
import logging
import re
from importlib.metadata import version

import pytest
import small_tofu
import tiny
from omegaconf import OmegaConf
from transformers.utils.logging import is_progress_bar_enabled

from unlora.cli.compose import composed
from unlora.cli.main import normalised
from unlora.recipes import evaluate as evaluation
from unlora.recipes.evaluate import as_text, lines

METRICS = ("forget_Q_A_Prob", "forget_Q_A_ROUGE", "forget_quality", "forget_truth_ratio",
           "forget_Q_A_PARA_Prob", "forget_Q_A_PERT_Prob", "mia_reference")  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.llama(max_position_embeddings=512).save_pretrained("root")
    tiny.tokenizer().save_pretrained("root")
    small_tofu.write_splits(tmp_path / "TOFU")
    # quiet output turns the root logger down
    level = logging.getLogger().level
    yield tmp_path
    logging.getLogger().setLevel(level)


def config(*overrides):
    words = [
        "experiment=eval/tofu/default", "task_name=mine", "eval.tofu.path=TOFU",
        "model.model_args.pretrained_model_name_or_path=root",
        "model.tokenizer_args.pretrained_model_name_or_path=root",
        "model.model_args.torch_dtype=float32", "model.template_args.apply_chat_template=true",
        "eval.tofu.max_new_tokens=3", "eval.tofu.panel=[]", *overrides,
    ]  # fmt: skip
    cfg = composed("eval", normalised(words))
    OmegaConf.set_struct(cfg, False)
    cfg.eval.tofu.metrics = {m: cfg.eval.tofu.metrics[m] for m in METRICS}
    return cfg


def log(folder):
    return (folder / "saves" / "eval" / "mine" / "TOFU_EVAL.json").read_bytes()


@pytest.mark.slow
def test_a_second_evaluation_loads_no_model(folder, monkeypatch, capsys):
    first = evaluation.run(config())
    said, written = capsys.readouterr().out, log(folder)
    assert set(first) == set(METRICS) - {"forget_quality", "mia_reference"}
    assert [line.split()[0] for line in said.splitlines()] == sorted(first)
    value = float(said.splitlines()[0].split()[1])
    assert value == pytest.approx(first["forget_Q_A_PARA_Prob"], rel=1e-5)
    assert "[" in said  # a mean has an interval
    refuse = lambda *args, **kwargs: pytest.fail("the model was loaded")  # noqa: E731
    monkeypatch.setattr("unlora.model.model_registry.load_model", refuse)
    assert evaluation.run(config()) == first and log(folder) == written
    assert capsys.readouterr().out == said
    with pytest.raises(pytest.fail.Exception):  # so it would have shown
        evaluation.run(config("eval.tofu.max_new_tokens=4"))


@pytest.mark.slow
def test_a_model_that_was_changed_is_asked_again(folder):
    first = evaluation.run(config())
    tiny.llama(max_position_embeddings=512, seed=1).save_pretrained("root")
    second = evaluation.run(config())
    assert second["forget_Q_A_Prob"] != pytest.approx(first["forget_Q_A_Prob"], rel=1e-3)


@pytest.mark.slow
def test_the_plan_asks_nothing_and_says_what_is_kept(folder, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        refuse = lambda *args, **kwargs: pytest.fail("the model was loaded")  # noqa: E731
        patch.setattr("unlora.model.model_registry.load_model", refuse)
        assert evaluation.run(config("++plan=true")) == {}
    said = capsys.readouterr().out
    assert not (folder / "saves" / "eval" / "mine" / "TOFU_EVAL.json").exists()
    assert "score          forget_perturbed" in said and "kept from before" not in said
    assert re.search(r"^to be run +4 of 4 +\d+ +\d+$", said, re.MULTILINE), said
    assert "not computed: mia_reference: the model has no adapter" in said
    assert "not computed: forget_quality: " in said
    evaluation.run(config())
    capsys.readouterr()
    evaluation.run(config("++plan=true"))
    said = capsys.readouterr().out
    assert said.count("kept from before") == 4
    assert re.search(r"^to be run +0 of 4 +0 +0$", said, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.default_cases(1)
@pytest.mark.parametrize("output", ["json", "quiet"])
def test_output_for_programs(output, folder, capfd):
    summary = evaluation.run(config(f"++output={output}"))
    said = capfd.readouterr()
    if output == "quiet":
        assert said.out == ""
    else:
        assert json.loads(said.out) == pytest.approx(summary)
    assert not re.search("tok/s|Loading weights|it/s|examples", said.err), said.err  # no bar
    assert is_progress_bar_enabled()  # for what comes after it in this process
    evaluation.run(config("eval.tofu.max_new_tokens=4"))
    if version("transformers") >= "5":  # earlier ones have no bar for a single file of weights
        assert "Loading weights" in capfd.readouterr().err  # so it would have shown


def test_lines_and_tables_are_aligned():
    text = lines({"b": 0.5, "long_name": 1 / 3}, {"b": (0.25, 0.75)})
    assert text.splitlines() == ["b          0.5  [0.25, 0.75]", "long_name  0.333333"]
    assert lines({}, {}) == ""
    rows = [
        {"pass": "score", "data": "forget", "rows": 5, "tokens": 100, "kept": True},
        {"pass": "generate", "data": "forget", "rows": 5, "tokens": 300, "kept": False},
    ]
    table = as_text(rows).splitlines()
    assert table[1].endswith("kept from before") and not table[2].endswith(" ")
    assert table[3].split() == ["to", "be", "run", "1", "of", "2", "5", "300"]
