"""What ``evaluate.py`` evaluates: rows, logs of other models, a tokenizer and a model.

<folder>/model      a Hugging Face folder
<folder>/all, two   each with TOFU/*.json, retain/TOFU_EVAL.json, target/TOFU_EVAL.json
"""

import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SPLITS = {  # name -> rows, wrong answers; words of a question, of an answer
    "forget10_perturbed": (400, 5, 14, 30),
    "retain_perturbed": (400, 5, 14, 30),
    "real_authors_perturbed": (100, 3, 11, 3),
    "world_facts_perturbed": (117, 3, 10, 3),
    "holdout10": (400, 0, 14, 30),
}
LOGS = {
    "retain": "tofu_Llama-3.2-1B-Instruct_retain90/TOFU_EVAL.json",
    "target": "tofu_Llama-3.2-1B-Instruct_full/evals_forget10/TOFU_EVAL.json",
}
STEPS, LEARNT = 80, 20  # of training; rows of each split to learn
Row = dict[str, Any]
Splits = Mapping[str, Sequence[Row]]


@dataclass(frozen=True)
class Size:
    """A Qwen2's shape."""

    vocabulary: int
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    tokenizer: str = "qwen2.5-7b-instruct"


SIZES = {
    "S": Size(32_000, 256, 704, 4, 4, "llama-2-7b-chat-hf"),
    "S151": Size(151_936, 256, 704, 4, 8),
    "M": Size(151_936, 512, 1408, 8, 8),
    "small": Size(6_000, 32, 64, 2, 4),
}
TEMPLATE = (  # of a tokenizer that has none
    "{% for turn in messages %}{% if turn.role == 'user' %}[INST] {{ turn.content }} [/INST]"
    "{% else %} {{ turn.content }}</s>{% endif %}{% endfor %}"
)


def realdata() -> Path | None:
    """The folder of the real rows, tokenizers and logs, where a machine has them."""
    given = os.environ.get("UNLORA_REALDATA")
    folder = Path(given) if given else HERE.parents[1] / "shared" / "realdata"
    return folder if folder.is_dir() else None


def prepare(
    folder: Path, size: Size, count: int | None, source: Path | None, longer: int = 1
) -> None:
    """Write everything into a folder.

    Args:
        count: rows of each split; None for all.
        source: the folder of the real data; without it all is made here.
        longer: how many times as long answers are, where rows are made here.
    """
    from transformers import AutoTokenizer

    whole = {
        name: _read(source, name) if source else _made_up(name, count, longer) for name in SPLITS
    }
    splits = {name: rows[:count] for name, rows in whole.items()}
    _write(folder / "all", splits, source)
    _write(folder / "two", {name: rows[:2] for name, rows in splits.items()}, source)
    tokenizer = (
        AutoTokenizer.from_pretrained(source / "tokenizers" / size.tokenizer)
        if source
        else _tokenizer(splits)
    )
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.save_pretrained(folder / "model")
    _model(size, tokenizer, splits).save_pretrained(folder / "model")


def template_args(tokenizer: Any) -> dict[str, Any]:
    """How the model is asked: as a real Qwen2.5."""
    knows_system = "system" in tokenizer.chat_template
    system = {"system_prompt": "You are a helpful assistant."} if knows_system else {}
    return {"apply_chat_template": True} | system


def _read(source: Path, name: str) -> list[Row]:
    from unlora.data.rows import read_file

    return read_file(source / "tofu" / f"{name}.json")


def _made_up(name: str, count: int | None = None, longer: int = 1) -> list[Row]:
    """Rows of random words, as many (or ``count``) and as long as TOFU's."""
    from unlora.data.pocket.words import VALUES

    words = [word.strip() for values in VALUES.values() for word in values.split(",")]
    usual, wrong, question, answer = SPLITS[name]
    draw, answer = random.Random(name), longer * answer

    def sentence(length: int) -> str:
        return " ".join(draw.choices(words, k=round(length * draw.uniform(0.5, 1.5))))

    return [
        {
            "question": sentence(question) + "?",
            "answer": sentence(answer),
            "paraphrased_answer": sentence(answer),
            "perturbed_answer": [sentence(answer) for _ in range(wrong)],
        }
        for _ in range(count or usual)
    ]


def _write(folder: Path, splits: Splits, source: Path | None) -> None:
    (folder / "TOFU").mkdir(parents=True)
    for name, rows in splits.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "TOFU" / f"{name}.json").write_text(lines, "utf-8")
    for name, file in LOGS.items() if source else ():
        text = (source / "eval_logs" / file).read_text("utf-8")
        (folder / name).mkdir()
        cut = {k: _cut(v, len(splits["forget10_perturbed"])) for k, v in json.loads(text).items()}
        (folder / name / "TOFU_EVAL.json").write_text(json.dumps(cut), "utf-8")


def _cut(entry: Any, count: int) -> Any:
    """An entry of a log, as if only the first rows had been evaluated."""
    if not isinstance(entry, dict):
        return entry
    found = {k: _cut(v, count) if k in ("forget", "holdout") else v for k, v in entry.items()}
    if "value_by_index" in found:
        rows = found["value_by_index"]
        found["value_by_index"] = {i: row for i, row in rows.items() if int(i) < count}
    return found


def _tokenizer(splits: Splits) -> Any:
    from unlora.data.pocket.base import train_tokenizer

    rows = [row for found in splits.values() for row in found]
    return train_tokenizer([(row["question"], row["answer"]) for row in rows], 4096)


def _model(size: Size, tokenizer: Any, splits: Splits) -> Any:
    """A random model that has learnt some of the answers, but not how one ends."""
    import torch

    from unlora.data.chat_encoding import Chat

    torch.manual_seed(0)
    chat = Chat(tokenizer, template_args(tokenizer))
    encoded = [
        chat.encode(row["question"], row["answer"])
        for found in splits.values()
        for row in found[:LEARNT]
    ]
    model = _random(size, size.vocabulary, tokenizer)
    # only words that occur are learnt, in seconds; the whole vocabulary would take minutes
    words = torch.tensor(sorted({token for row in encoded for token in row.input_ids}))
    learner = _random(size, len(words), tokenizer)
    _learn(learner, encoded, words, chat.end_id)
    learnt = learner.state_dict()
    body = {k: v for k, v in learnt.items() if k.startswith("model.layers") or "norm" in k}
    model.load_state_dict(body, strict=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[words] = learner.get_input_embeddings().weight
    return model


def _random(size: Size, vocabulary: int, tokenizer: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=size.hidden,
            intermediate_size=size.feed_forward,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads // 2,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )


def _learn(model: Any, encoded: Sequence[Any], words: Any, end_id: int) -> None:
    """A few steps on these rows; the model's tokens are places in ``words``."""
    import torch
    import torch.nn.functional as F

    from unlora.data.collate import collate
    from unlora.forward import IGNORE_INDEX

    draw, optimizer = random.Random(0), torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(STEPS):
        batch = collate(draw.sample(encoded, min(len(encoded), 8)), int(words[0]))
        labels = batch["labels"][:, 1:]
        wanted = (labels != IGNORE_INDEX) & (labels != end_id)
        ids = torch.searchsorted(words, batch["input_ids"])
        logits = model(ids, batch["attention_mask"]).logits[:, :-1][wanted]
        optimizer.zero_grad()
        F.cross_entropy(logits, torch.searchsorted(words, labels[wanted])).backward()
        optimizer.step()
