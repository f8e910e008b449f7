"""MUSE's scalability and sustainability, typed as a user would, on a tiny model and few rows."""

import json

import pytest
from tiny import llama, tokenizer

from unlora.cli.compose import composed
from unlora.cli.main import normalised
from unlora.config import read
from unlora.data import load_parts
from unlora.data.chat_encoding import Chat
from unlora.recipes import train

ROWS = {
    "MUSE-News-Train/full": 9,
    "MUSE-News/raw/retain1": 5,
    "MUSE-News/raw/forget": 7,
    **{f"MUSE-News/scal/forget_{n}": 2 * n for n in range(1, 5)},
    **{f"MUSE-News/sust/forget_{n}": 2 + n % 2 for n in range(1, 5)},
}
WEIGHTS = "model.model_args.pretrained_model_name_or_path"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llama(max_position_embeddings=512).save_pretrained("root")
    tokenizer().save_pretrained("root")
    for name, number in ROWS.items():
        file = tmp_path / "data" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([{"text": f"{name} article {n}"} for n in range(number)]))
    return tmp_path


def config(name, experiment, *overrides):
    words = [
        f"experiment={experiment}", "paths.datasets_dir=data", "~eval.muse",
        "model.tokenizer_args.pretrained_model_name_or_path=root",
        "model.model_args.torch_dtype=float32", "model.lora_config.r=4",
        "trainer.args.max_steps=2", "trainer.args.learning_rate=1e-2",
        "trainer.args.disable_tqdm=true", *overrides,
    ]  # fmt: skip
    return composed(name, normalised(words))


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("kind", ["scalability", "sustainability"])
@pytest.mark.parametrize("part", range(1, 5))
def test_each_request_reads_its_own_articles(folder, kind, part):
    cfg = read(config("unlearn", f"unlearn/muse/{kind}", f"forget_split=forget_{part}"))
    parts = load_parts(
        cfg.data, Chat(tokenizer(), {}), ("forget", "retain"), seed=0, datasets_dir="data"
    )
    said = {side: tokenizer().decode(rows[0].input_ids) for side, rows in parts.rows.items()}
    assert f"MUSE-News/{kind[:4]}/forget_{part} article 0" in said["forget"]
    assert "MUSE-News/raw/retain1 article 0" in said["retain"]
    assert cfg.task_name == f"unlearn_muse_{kind}_forget_{part}"


@pytest.mark.slow
def test_every_request_lies_on_top_of_those_before(folder):
    train.run(config("train", "finetune/muse/lora", f"{WEIGHTS}=root"))
    for part in (1, 2):
        split = f"forget_split=forget_{part}"
        train.run(config("unlearn", "unlearn/muse/sustainability", "trainer=NPO", split))
    saves = folder / "saves" / "unlearn"
    run = saves / "unlearn_muse_sustainability_forget_2"
    links = [link["path"] for link in json.loads((run / "lineage.json").read_text())["links"]]
    assert links == [
        "../../finetune/finetune_muse_lora", "../unlearn_muse_sustainability_forget_1", ".",
    ]  # fmt: skip
    manifests = [
        json.loads((saves / f"unlearn_muse_sustainability_forget_{part}/manifest.json").read_text())
        for part in (1, 2)
    ]
    assert all("start equals target" in manifest["guards"] for manifest in manifests)
    first, second = (manifest["data"] for manifest in manifests)
    assert first["retain"] == second["retain"] and first["forget"] != second["forget"]
