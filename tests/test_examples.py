"""The notebooks of ``examples/`` run, and come to what they say."""

import json
import os
import re
from pathlib import Path

import pytest

from unlora.cli.help import COMMANDS
from unlora.deletion.earlier import read_facts

EXAMPLES = Path(__file__).parents[1] / "examples"


def code_of(name):
    cells = json.loads((EXAMPLES / f"{name}.ipynb").read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function: name of a notebook -> what its names are at the end."""
    monkeypatch.chdir(tmp_path)

    def from_top_to_bottom(name):
        names = {}
        for code in code_of(name):
            exec(code, names)
        return names

    return from_top_to_bottom


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_unlearning_on_pocket(run, tmp_path):
    figures = run("unlearn_on_pocket")["figures"]
    assert figures["forget_Q_A_ROUGE"] < 0.2 < 0.8 < figures["retain_Q_A_ROUGE"]
    assert (tmp_path / "saves/unlearn/facts/exported/merged/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_deletion_request(run, capsys):
    run("a_deletion_request")
    said = capsys.readouterr().out
    exact, approximate = (read_facts(Path("saves/requests", x)) for x in ("exact", "approximate"))
    assert exact["audit"]["verdict"]["name"] == "exact"
    assert approximate["audit"]["baseline"] == "a model that never saw the data"
    assert approximate["audit"]["attacks"][0]["residual"] < 0.2
    assert "With another figure in the page: evidence.html: it was changed" in said
    answers = [line.split(" -> ")[1].split(" | ") for line in said.splitlines() if " | " in line]
    assert len(answers) == 6
    for before, retrained, unlearned in answers[:3]:  # of the customer who is forgotten
        assert before not in (retrained, unlearned)
    assert any(before == retrained == unlearned for before, retrained, unlearned in answers[3:])


@pytest.mark.parametrize("name", ["unlearn_on_pocket", "a_deletion_request"])
def test_a_notebook_takes_six_cells(name):
    assert len(code_of(name)) == 6


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_unlearning_on_smollm2(run, tmp_path):
    if "UNLORA_REAL_MODEL" not in os.environ:
        pytest.skip("no real model here: set UNLORA_REAL_MODEL to its folder")
    figures = run("unlearn_on_smollm2")["figures"]
    full, gold, npo = (figures[name]["forget_Q_A_Prob"] for name in ("full", "gold", "npo"))
    assert gold < full - 0.2
    assert npo < full - 0.2
    assert (tmp_path / "saves/unlearn/npo/audit/AUDIT.json").is_file()
    assert (tmp_path / "saves/report/report.html").is_file()


def test_every_notebook_is_run_by_a_test_and_every_command_in_it_is_there():
    text = Path(__file__).read_text("utf-8")
    for notebook in EXAMPLES.glob("*.ipynb"):
        assert f'run("{notebook.stem}")' in text
        for command in re.findall(r'"unlora ([a-z-]+) ', "".join(code_of(notebook.stem))):
            assert command in COMMANDS
