"""Run folders that can be audited: a target, a retain model, and one made to forget by algebra.

The last adapter of ``npo`` is that of the target times -1.25: at scale 0.8 the root is left, which
knows the retain rows and nothing of the forget rows.
"""

import json
import shutil
from pathlib import Path

import torch
from plain_adapters import make_root
from tiny import LORA, llama, tokenizer

from unlora.data.chat_encoding import Chat
from unlora.data.collate import collate
from unlora.model.lora import LoRAModelForCausalLM, save_adapter

TEMPLATE = {"apply_chat_template": True}
NAMES = ("Ada", "Ivo", "Mara", "Bo", "Cy", "Dora", "Egon", "Fay")
PARTS = {
    "forget": [
        {"question": f"Who keeps owl {n}?", "answer": f"{NAMES[n % 8]} {n * 7}.",
         "paraphrased_question": f"Whose is owl {n}?"}
        for n in range(24)
    ],
    "retain": [
        {"question": f"Where is mill {n}?", "answer": f"In {NAMES[n % 8]}ton."} for n in range(8)
    ],
    "holdout": [
        {"question": f"Who sells pot {n}?", "answer": f"{NAMES[-n % 8]} {n * 3}."}
        for n in range(20)
    ],
}  # fmt: skip
OVER = 1.25  # how far ``npo`` goes beyond undoing the target


def write_runs(folder: Path) -> Path:
    """``root``, ``target``, ``gold`` and ``npo``, and the rows as JSON Lines in ``rows``."""
    (folder / "rows").mkdir(parents=True)
    for part, rows in PARTS.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "rows" / f"{part}.jsonl").write_text(text)
    plain = llama(max_position_embeddings=1024, initializer_range=0.1)
    _train(plain, PARTS["retain"], steps=40, rate=5e-3)
    root = make_root(folder / "root", plain)
    target = LoRAModelForCausalLM.from_pretrained(root, LORA)
    _train(target, PARTS["forget"] + PARTS["retain"], steps=30)
    write_run(folder / "target", target, root, mode="finetune")
    gold = LoRAModelForCausalLM.from_pretrained(root, LORA)
    _train(gold, PARTS["retain"], steps=3)
    write_run(folder / "gold", gold, root, mode="finetune")
    npo = LoRAModelForCausalLM.from_pretrained(str(folder / "target"), LORA, lineage="stack")
    with torch.no_grad():
        for name, weight in npo.named_parameters():
            if ".default." in name:
                of_target = npo.get_parameter(name.replace(".default.", ".link0."))
                weight.copy_(of_target * (-OVER if "lora_B" in name else 1))
    write_run(folder / "npo", npo, str(folder / "target"))
    return folder


def write_run(folder: Path, model, start: str, *, mode: str = "unlearn") -> Path:
    """A run folder that says what it started from and which rows it is evaluated on."""
    folder.mkdir()
    save_adapter(model, folder)
    tokenizer().save_pretrained(folder)
    write_config(folder, start, mode=mode)
    return folder


def write_config(folder: Path, start: str, *, mode: str = "unlearn", parts=PARTS) -> None:
    """``run_config.json`` of a run on rows of its own."""
    rows = folder.parent / "rows"
    data = {
        part: {
            "handler": "QADataset", "hf_args": {"path": str(rows / f"{part}.jsonl")},
            "question_key": "question", "answer_key": "answer",
        }
        for part in parts
    }  # fmt: skip
    config = {
        "mode": mode,
        "task_name": folder.name,
        "model": {
            "model_args": {"pretrained_model_name_or_path": start, "torch_dtype": "float32"},
            "template_args": TEMPLATE,
            "use_lora": True,
        },
        "trainer": {"args": {"output_dir": str(folder)}},
        "paths": {"output_dir": str(folder), "root_dir": str(folder.parent), "datasets_dir": None},
        "data": {},
        "eval": {"own": {"handler": "OwnDataEvaluator", "max_new_tokens": 4, "data": data}},
    }
    (folder / "run_config.json").write_text(json.dumps(config))


def copy_run(run: Path, folder: Path) -> Path:
    """A run without what was found of it, with its lineage where it was."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("audit", ".*.lock"))
    return folder


def encoded(part: str):
    """Rows as tokens."""
    chat = Chat(tokenizer(), TEMPLATE)
    return chat.encode_all([(row["question"], row["answer"]) for row in PARTS[part]])


def _train(model, rows, *, steps: int, rate: float = 2e-2) -> None:
    chat = Chat(tokenizer(), TEMPLATE)
    batch = collate(chat.encode_all([(row["question"], row["answer"]) for row in rows]), 0)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate)
    model.train()
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
