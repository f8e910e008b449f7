"""The notebooks of ``examples/`` run, and come to what they say."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))


def code_of(notebook):
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[file.stem for file in NOTEBOOKS])
def test_a_notebook_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in code_of(notebook):
        exec(code, names)
    figures = names["figures"]
    assert figures["forget_Q_A_ROUGE"] < 0.2 < 0.8 < figures["retain_Q_A_ROUGE"]
    assert (tmp_path / "saves/unlearn/facts/exported/merged/model.safetensors").is_file()


def test_unlearning_on_pocket_takes_six_cells():
    [notebook] = NOTEBOOKS
    assert len(code_of(notebook)) == 6
