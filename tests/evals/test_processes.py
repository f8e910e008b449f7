"""An evaluation by two processes writes what one process writes, byte for byte."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_tofu
import tiny
import torch

from unlora.model import get_model
from unlora.model.lora import save_adapter

SRC = Path(__file__).parents[2] / "src"
LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"], "lora_alpha": 4}


@pytest.fixture
def run(tmp_path):
    """A run folder with an adapter, and rows to ask it about."""
    tiny.llama(max_position_embeddings=512).save_pretrained(tmp_path / "root")
    tiny.tokenizer().save_pretrained(tmp_path / "root")
    asked = {"model_args": {"pretrained_model_name_or_path": str(tmp_path / "root")},
             "use_lora": True, "lora_config": LORA}  # fmt: skip
    model, tokenizer = get_model(asked)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1, generator=generator)
    save_adapter(model, tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    small_tofu.write_splits(tmp_path / "TOFU")
    return tmp_path


def evaluate(folder, name, *launcher):
    """Start ``src/eval.py`` and wait for its end."""
    command = [
        sys.executable, *launcher, str(SRC / "eval.py"), "experiment=eval/tofu/default",
        "model.model_args.pretrained_model_name_or_path=run",
        "model.tokenizer_args.pretrained_model_name_or_path=run",
        "model.model_args.torch_dtype=float32", "model.template_args.apply_chat_template=true",
        f"eval.tofu.path={folder / 'TOFU'}", "eval.tofu.max_new_tokens=6",
        "eval.tofu.token_budget=400", f"paths.output_dir={folder / name}",
    ]  # fmt: skip
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = alone | {"OMP_NUM_THREADS": "1", "UNLORA_CACHE": str(folder / f"cache-{name}")}
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def kept(folder, name):
    files = (folder / f"cache-{name}").rglob("*.answers")
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.slow
def test_two_processes_write_what_one_writes(run):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    started = [evaluate(run, "one"), evaluate(run, "two", *torchrun)]
    try:
        for process in started:
            said, _ = process.communicate()  # pytest's own timeout ends it
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in started:
            process.kill()
    files = [{f.name for f in (run / name).rglob("*") if f.is_file()} for name in ("one", "two")]
    assert files[0] == files[1] and not any("tmp" in name for name in files[0])
    for name in ("TOFU_EVAL.json", "TOFU_SUMMARY.json"):
        one, two = ((run / folder / name).read_bytes() for folder in ("one", "two"))
        assert one == two, name
    summary = json.loads((run / "one" / "TOFU_SUMMARY.json").read_text())
    assert summary["forget_Q_A_Prob"] > 0 and summary["mia_gradnorm"] is not None
    assert kept(run, "one") == kept(run, "two") != {}
    # the second process leaves the talking to the first
    assert said.count("forget_Q_A_PARA_Prob ") == 1
