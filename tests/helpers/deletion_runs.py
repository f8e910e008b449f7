"""A model that was fine-tuned on a user's rows, as deletion requests find it."""

import json
import os
from pathlib import Path

from tiny import llama, tokenizer

from unlora.cli.main import main

TRAINING = (
    "trainer.args.max_steps=4", "trainer.args.per_device_train_batch_size=4",
    "trainer.args.gradient_accumulation_steps=1", "trainer.args.learning_rate=1e-2",
    "trainer.args.report_to=none", "model.lora_config.r=4",
)  # fmt: skip
NAMES = ("Ada", "Ivo", "Mara", "Bo", "Cy", "Dora")
ROWS = [
    {"question": f"Who keeps owl {n}?", "answer": f"{NAMES[n % 6]} {n * 7}.", "customer": n % 6}
    for n in range(24)
]
MODEL = "saves/finetune/full"
QUICK = ("--dial", "none", "audit=none", *TRAINING[:1])


def write_rows(file: str | Path, rows) -> str:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def train(name: str, file: str, model: str = "root", *words: str) -> None:
    """``unlora train`` in this folder."""
    main(["train", "experiment=finetune/own/lora", f"model={model}", f"data.train={file}",
          f"task_name={name}", *TRAINING, *words])  # fmt: skip


def make_model(folder: Path) -> Path:
    """A root model, a file of rows, and a model that was trained on them, in a folder."""
    llama(max_position_embeddings=512).save_pretrained(folder / "root")
    tokenizer().save_pretrained(folder / "root")
    before = os.getcwd()
    os.chdir(folder)
    try:
        train("full", write_rows("train.jsonl", ROWS))
    finally:
        os.chdir(before)
    return folder


def forget(*words: str) -> None:
    """``unlora forget`` in this folder."""
    main(["forget", *words])


def facts(name: str) -> dict:
    """Kind of entry -> content, of a request's evidence."""
    entries = json.loads(Path("saves/requests", name, "evidence.json").read_text())["entries"]
    return {entry["kind"]: entry["content"] for entry in entries}


def lasting_evidence(folder: Path) -> tuple[Path, dict]:
    """The only request of a folder, and what its evidence says that is no time."""
    [file] = folder.glob("saves/requests/*/evidence.json")
    entries = json.loads(file.read_text())["entries"]
    known = {entry["kind"]: entry["content"] for entry in entries}
    return file.parent, {kind: known[kind] for kind in known if kind not in ("measured", "files")}


def weights(folder: str) -> bytes:
    """Of an adapter, to the bit."""
    return Path(folder, "adapter_model.safetensors").read_bytes()
