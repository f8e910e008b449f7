"""lm-eval's own command on what `unlora export` writes."""

import json
import os
import subprocess
import sys

import pytest
from plain_adapters import make_adapter, make_root
from small_harness import write_tasks
from tiny import llama, tokenizer

from unlora.model.standalone import export

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        subprocess.run([sys.executable, "-c", "import lm_eval"], capture_output=True).returncode,
        reason="pip install 'unlora[lm-eval]'",
    ),
]


def lm_eval(folder, **model):
    """Its process, and the accuracy with its log-probabilities where it came to one."""
    args = ",".join(f"{key}={value}" for key, value in {**model, "dtype": "float32"}.items())
    out = folder / f"out-{len(list(folder.iterdir()))}"
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", args,
         "--tasks", "rivers", "--include_path", str(write_tasks(folder / "tasks")),
         "--device", "cpu",
         "--batch_size", "1", "--log_samples", "--output_path", str(out)],
        capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")},
    )  # fmt: skip
    samples = [json.loads(line) for file in out.rglob("samples*") for line in file.open()]
    return done, [float(r[0]) for s in samples for r in s["filtered_resps"]]


def exported(folder, **config):
    root = make_root(folder / "root", llama(tied=True, max_position_embeddings=512))
    run = make_adapter(root, folder / "ad", **config)
    tokenizer().save_pretrained(run)
    return root, export(str(run), "merged"), export(str(run), "adapter")


def test_it_reads_merged_weights_and_an_adapter_beside_the_head_alike(tmp_path):
    root, merged, adapter = exported(tmp_path, target_modules=["q_proj", "down_proj"])
    of_merged, of_adapter, of_root = (
        lm_eval(tmp_path, **model)[1]
        for model in ({"pretrained": merged}, {"pretrained": root, "peft": adapter},
                      {"pretrained": root})
    )  # fmt: skip
    assert len(of_merged) == len(of_adapter) == 14 * 4
    assert of_merged == pytest.approx(of_adapter, abs=1e-3) != of_root


def test_of_an_adapter_on_a_tied_head_it_reads_the_merged_weights_as_the_readme_says(tmp_path):
    root, merged, adapter = exported(tmp_path)
    assert "ends in a KeyError" in (adapter / "README.md").read_text()
    assert len(lm_eval(tmp_path, pretrained=merged)[1]) == 14 * 4
    done, figures = lm_eval(tmp_path, pretrained=root, peft=adapter)
    assert done.returncode and not figures and "KeyError" in done.stderr
