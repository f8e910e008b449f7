"""docs/add_a_metric.md, followed to the letter."""

import json
import re
import shlex
from pathlib import Path

import pytest
import small_tofu
import tiny

from unlora.cli.compose import composed
from unlora.cli.main import normalised
from unlora.config import read
from unlora.evals import build_suites, metrics, passes
from unlora.evals.metrics import METRICS
from unlora.evals.passes.declaration import PASSES

PAGE = (Path(__file__).parents[1] / "docs" / "add_a_metric.md").read_text("utf-8")
FILES = re.findall(r"```python\n(# src/evals/(\w+)/(\w+)\.py\n.*?)```", PAGE, re.DOTALL)
COMMAND = re.search(r"```\n(unlora eval .*?)\n```", PAGE)[1]


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The files of the page, where a user's checkout would have them."""
    for registry in (PASSES, METRICS):
        monkeypatch.setattr(registry, "_entries", {name: registry[name] for name in registry})
        monkeypatch.setattr(registry, "_is_complete", False)  # it looks again
    for text, folder, name in FILES:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.py").write_text(text, "utf-8")
    for package in (metrics, passes):
        folder = str(tmp_path / package.__name__.rpartition(".")[2])
        monkeypatch.setattr(package, "__path__", [*package.__path__, folder])


def test_the_page_works(added, tmp_path):
    words = normalised(shlex.split(COMMAND)[2:])
    asked = read(composed("eval", words)).eval["tofu"]["metrics"]
    new = {name: asked[name] for name in ("worst", "length")}
    small_tofu.write_splits(tmp_path / "TOFU")
    config = small_tofu.eval_config(tmp_path / "TOFU")
    config["tofu"]["metrics"] = new
    config["tofu"]["panel"] = []
    (suite,) = build_suites(
        config, tokenizer=tiny.tokenizer(), template_args=small_tofu.TEMPLATE_ARGS
    )
    found = suite.evaluate(tiny.adapted(tiny.llama()), tmp_path / "out")
    log = json.loads((tmp_path / "out" / "TOFU_EVAL.json").read_text())
    of_rows = [row["score"] for row in log["length"]["value_by_index"].values()]
    answers = suite.sources["forget"].answers
    scored = [sum(label != -100 for label in row.labels) for [row] in answers]
    assert of_rows == scored and found["length"] == pytest.approx(sum(scored) / len(scored))
    assert found["worst"] < 0
