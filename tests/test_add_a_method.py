"""docs/add_a_method.md, followed to the letter."""

import math
import re
from pathlib import Path

import pytest
from tiny import LORA, llama, rows, tokenizer

from unlora import objectives
from unlora.cli.compose import composed
from unlora.cli.main import normalised
from unlora.config import read
from unlora.data.pairs import Parts
from unlora.model.probe import Probe
from unlora.objectives import TERMS
from unlora.trainer import Plugins, UnlearningLoss, UnlearningTrainer, training_arguments

PAGE = (Path(__file__).parents[1] / "docs" / "add_a_method.md").read_text("utf-8")
FUNCTION, TEST = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
YAML = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1]
COMMAND = re.search(r"```\n(unlora unlearn .*?)\n```", PAGE)[1]


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The files of the page, where a user's checkout would have them."""
    for text in (FUNCTION, YAML):
        folder, _, file = re.match(r"# (?:src/)?(.*)/(.*?)(.*)\n", text).groups()
        path = tmp_path / folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    monkeypatch.setattr(
        objectives, "__path__", [*objectives.__path__, str(tmp_path / "objectives")]
    )
    monkeypatch.setattr(TERMS, "_is_complete", False)  # it may have looked before
    yield tmp_path
    TERMS._entries.pop("ChanceLevel")


def test_it_is_under_25_lines():
    lines = [line for text in (FUNCTION, YAML, TEST) for line in text.splitlines() if line.strip()]
    assert len(lines) < 25


def test_the_page_works(added):
    from views import said, value

    exec(TEST, {"value": value, "said": said, "math": math})
    searchpath = f"hydra.searchpath=[file://{added / 'configs'}]"
    words = normalised(COMMAND.split()[2:])
    config = read(composed("unlearn", [*words, searchpath])).trainer
    loss = UnlearningLoss.build(config.handler, **config.method_args)
    assert loss.forget.hyper == {"margin": 0.5}
    trainer = UnlearningTrainer(
        model=_lora(),
        args=training_arguments(
            {
                "max_steps": 2,
                "report_to": "none",
                "learning_rate": 1e-2,
                "disable_tqdm": True,
                "save_strategy": "no",
            },
            output_dir=str(added),
        ),
        loss=loss,
        plugins=Plugins.build(config.plugins, loss, use_lora=True),
        parts=Parts({"forget": rows([3, 2]), "retain": rows([2, 4, 1])}, "forget"),
        processing_class=tokenizer(),
    )
    before = Probe.take(trainer.model)
    trainer.train()
    assert before.difference(trainer.model)[0] > 1e-3


def _lora():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(llama(), LoraConfig(**LORA, task_type="CAUSAL_LM"))
