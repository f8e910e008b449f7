"""A few rows under the names of TOFU's splits, and the shipped configs of the suites for them."""

import copy
import functools
import json
from pathlib import Path

import torch
from omegaconf import OmegaConf
from transformers import BertConfig, BertForSequenceClassification

from unlora.cli.compose import composed
from unlora.config.metrics import shipped_metrics

TEMPLATE_ARGS = {"apply_chat_template": True}


def qa(n, *, paraphrase=True, wrong=2):
    """One row, with everything that a perturbed split has."""
    row = {
        "question": f"What did author {n} write?",
        "answer": f"Author {n} wrote the quiet river number {n * 7}.",
        "perturbed_answer": [f"Nothing but {k}{n}." for k in range(wrong)],
    }
    if paraphrase:
        row |= {
            "paraphrased_question": f"Which book is by author {n}?",
            "paraphrased_answer": f"The quiet river number {n * 7} is by author {n}.",
        }
    return row


def write_splits(folder: Path, *, holdout: int = 6) -> Path:
    """The splits that the suite reads, in a folder of this name."""
    folder.mkdir(parents=True)
    splits = {
        "forget10_perturbed": [qa(n) for n in range(5)],
        "retain_perturbed": [qa(n) for n in range(10, 16)],
        "real_authors_perturbed": [qa(n, paraphrase=False, wrong=3) for n in range(20, 24)],
        "world_facts_perturbed": [qa(n, paraphrase=False, wrong=3) for n in range(30, 33)],
        "holdout10": [
            {k: qa(n)[k] for k in ("question", "answer")} for n in range(40, 40 + holdout)
        ],
    }
    for name, rows in splits.items():
        write_rows(folder / f"{name}.json", rows)
    return folder


def write_rows(file: Path, rows: list[dict]) -> None:
    """JSON Lines, as TOFU has them."""
    file.write_text("\n".join(json.dumps(row) for row in rows))


def eval_config(folder, *overrides, suite="tofu"):
    """The shipped config of a suite, as the entry points hand it over."""
    paths = (f"eval.tofu.path={folder}", "eval.tofu.max_new_tokens=8") if suite == "tofu" else ()
    given = ("+paths.output_dir=unused", f"eval.{suite}.batch_size=3", *paths, *overrides)
    return copy.deepcopy(_composed("eval/" + suite, given))


@functools.cache
def _composed(name, overrides):
    cfg = composed(name, list(overrides))
    return OmegaConf.to_container(cfg.eval, resolve=True)


def every_metric() -> dict[str, dict]:
    """All metrics that TOFU can be asked for."""
    return dict(sorted(shipped_metrics("tofu").items()))


def save_classifier(folder: Path, tokenizer, *, seed: int = 0) -> str:
    """A tiny classifier of gibberish that knows nothing."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, id2label={0: "noise", 1: "clean"}, label2id={"noise": 0, "clean": 1},
        initializer_range=1.0,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
