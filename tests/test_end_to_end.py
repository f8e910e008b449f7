"""The documented commands on real TOFU, from fine-tuning to an exported model.

Slow: needs the real data (UNLORA_REALDATA) and a few minutes. ``make test-slow`` runs it.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny import qwen2
from transformers import AutoModelForCausalLM, AutoTokenizer

from unlora.data.rows import load_rows

REPOSITORY = Path(__file__).parents[1]
ROWS = 20
SHORT = [
    "trainer.args.max_steps=3",
    "trainer.args.eval_strategy=no",
    "trainer.args.save_strategy=no",
    "model.lora_config.r=8",
    "eval.tofu.max_new_tokens=8",
]


def unlora(folder, script, *arguments):
    command = [sys.executable, str(REPOSITORY / "src" / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr + done.stdout


@pytest.fixture(params=["stories260K", "qwen2"])
def root(request, realdata, tmp_path):
    """A real trained Llama with tied embeddings, and a random Qwen2 with the real tokenizer."""
    if request.param == "stories260K":
        return realdata / "tiny_lm" / "stories260K" / "hf", "Llama-2-7b-chat-hf-lora"
    folder = tmp_path / "qwen2"
    tokenizer = AutoTokenizer.from_pretrained(realdata / "tokenizers" / "qwen2.5-7b-instruct")
    model = qwen2(
        vocab_size=151936, hidden_size=32, num_hidden_layers=2, max_position_embeddings=1024,
        initializer_range=0.1,
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, "Qwen2.5-3B-Instruct-lora"


def first_rows(source, target):
    """A folder with the first rows of each file: a vocabulary of 151,936 is slow on a CPU."""
    target.mkdir(parents=True)
    for file in source.glob("*.json"):
        for row in load_rows(str(file))[:ROWS]:
            with open(target / file.name, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_real_tofu_from_finetuning_to_export(root, realdata, tmp_path):
    base, model = root
    common = [
        f"model={model}",
        f"paths.datasets_dir={realdata}",
        f"model.tokenizer_args.pretrained_model_name_or_path={base}",
        "model.model_args.torch_dtype=float32",
        *SHORT,
    ]
    weights = "model.model_args.pretrained_model_name_or_path="
    unlora(
        tmp_path, "train.py", "--config-name=train", "@experiment=finetune/tofu/lora", *common,
        f"{weights}{base}", "task_name=full", "~eval.tofu",
    )  # fmt: skip
    said = unlora(
        tmp_path, "train.py", "--config-name=unlearn", "@experiment=unlearn/tofu/lora", *common,
        f"{weights}saves/finetune/full", "trainer=NPO", "task_name=npo", "~eval.tofu",
    )  # fmt: skip
    assert "guard: start equals target" in said and "guard: gradients alive" in said
    run = tmp_path / "saves" / "unlearn" / "npo"
    links = json.loads((run / "lineage.json").read_text())["links"]
    assert [link["path"] for link in links] == ["../../finetune/full", "."]
    size = (run / "adapter_model.safetensors").stat().st_size
    assert size < (base / "model.safetensors").stat().st_size, "the adapter only"

    first_rows(realdata / "tofu", tmp_path / "some" / "TOFU")
    unlora(
        tmp_path, "eval.py", "experiment=eval/tofu/default",
        *[c for c in common if not c.startswith("trainer.")],
        f"paths.datasets_dir={tmp_path / 'some'}",
        f"{weights}saves/unlearn/npo", "task_name=npo", "forget_split=forget01",
        "holdout_split=holdout01",
    )  # fmt: skip
    log = json.loads((tmp_path / "saves" / "eval" / "npo" / "TOFU_EVAL.json").read_text())
    assert len(log["forget_Q_A_Prob"]["value_by_index"]) == ROWS
    assert log["forget_quality"]["agg_value"] is None and "not_computed" in log["forget_quality"]

    from unlora.cli.main import main
    from unlora.model import get_model

    asked, tokenizer = get_model(
        {"model_args": {"pretrained_model_name_or_path": str(run)}}, trainable=False
    )
    ids = torch.tensor([tokenizer("Who wrote the book?").input_ids])
    expected = asked(ids).logits
    for form in ("merged", "adapter"):
        main(["export", str(run), f"--{form}"])
    merged = AutoModelForCausalLM.from_pretrained(run / "exported" / "merged")
    adapter = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), run / "exported" / "adapter"
    )
    # float32 rounding on logits of size 10
    torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(adapter.eval()(ids).logits, expected, rtol=0, atol=1e-3)
