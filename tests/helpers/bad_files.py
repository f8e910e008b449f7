"""Commands on files that are wrong: what is said, and that nothing else happens."""

import json
import re
from pathlib import Path

import pytest
import tiny

from unlora.cli.compose import composed
from unlora.cli.main import main
from unlora.cli.overrides import given
from unlora.config.unused_keys import unused
from unlora.errors import InputError, system_in_words
from unlora.model import get_model
from unlora.model.lora import save_adapter

FORGET = [
    {"question": f"Who keeps the {animal}?", "answer": f"{name} keeps the {animal}."}
    for name, animal in (("Ada", "bees"), ("Ivo", "geese"), ("Mara", "owls"))
]
RETAIN = [
    {"question": f"Where is the {place}?", "answer": f"The {place} is in {town}."}
    for place, town in (("mill", "Arlow"), ("bridge", "Tenby"))
]
FILES = ("data.forget=forget.jsonl", "data.retain=retain.jsonl")
UNLEARN = ("unlearn", "experiment=unlearn/own/lora", *FILES, "trainer=NPO", "task_name=mine",
           "trainer.args.max_steps=1")  # fmt: skip
EVAL = ("eval", *FILES, "task_name=mine")
# what is left of earlier runs of these names; a run that fails must not touch it
EARLIER = {
    "saves/unlearn/mine/adapter_model.safetensors": "an adapter",
    "saves/unlearn/mine/manifest.json": "{}",
    "saves/eval/mine/OWN_EVAL.json": "{}",
    "saves/eval/mine/eval_manifest.json": "{}",
}


def lines(*rows: object) -> bytes:
    """Rows as JSONL."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def make_models(folder: Path, *, adapters: bool = True) -> None:
    """A root model, an adapter run on it, and a second run on top of that."""
    tiny.llama(max_position_embeddings=512).save_pretrained(folder / "root")
    tiny.tokenizer().save_pretrained(folder / "root")
    for name, below in (("run", "root"), ("second", "run")) if adapters else ():
        asked = {
            "model_args": {"pretrained_model_name_or_path": str(folder / below)},
            "use_lora": True,
            "lora_config": {"r": 2, "target_modules": ["q_proj"]},
        }
        model, tokenizer = get_model(asked)
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                weight.data.fill_(0.1)
        save_adapter(model, folder / name)
        tokenizer.save_pretrained(folder / name)


def write_good_files(folder: Path) -> None:
    """Data that are right, and the folders of earlier runs."""
    folder.mkdir(exist_ok=True)
    (folder / "forget.jsonl").write_bytes(lines(*FORGET))
    (folder / "retain.jsonl").write_bytes(lines(*RETAIN))
    for name, content in EARLIER.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; locks hold nothing."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and not file.name.endswith(".lock")
    }


def refuse_weights(monkeypatch) -> None:
    """Fail where weights are read."""
    for name in ("transformers.AutoModelForCausalLM", "peft.PeftModel"):
        monkeypatch.setattr(f"{name}.from_pretrained", lambda *_, **__: pytest.fail("loaded"))


def refused(words, expected: str, capsys, monkeypatch) -> None:
    """A command ends with this one sentence and exit code 2; every file is then as it was.

    It goes through the entry point; whatever is raised but SystemExit would be a traceback. The
    same words are composed once in a session: what differs between tests is what files hold.

    Args:
        expected: a regular expression that is found in the sentence.
    """
    said: list[str] = []
    monkeypatch.setattr("unlora.cli.main._say", lambda error: said.append(str(error)))
    monkeypatch.setattr("unlora.cli.main._run_hydra", _run_composed)
    here, before = Path.cwd(), contents(Path.cwd())
    with pytest.raises(SystemExit) as exit_:
        main(list(words))
    assert exit_.value.code == 2
    assert len(said) == 1
    assert re.search(expected, said[0]), said[0]
    assert is_one_line(said[0]), said[0]
    assert "Traceback" not in "".join(capsys.readouterr())
    assert contents(here) == before, {k for k in contents(here).keys() ^ before.keys()}


def _run_composed(run, default, name, args, typed) -> None:
    config = composed(name, args)
    if wrong := unused(config, given(args)):
        raise InputError("\n".join(wrong))
    with system_in_words():
        run(config)


def is_one_line(text: str) -> bool:
    """Whether it is short enough to be read, and ends."""
    return "\n" not in text and len(text) < 500 and text[-1] in ".?!)"
