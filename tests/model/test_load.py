"""Weights into memory: what a model refuses is replaced with a line."""

import families
import pytest
import torch

from unlora.errors import InputError
from unlora.model.lineage import Lineage
from unlora.model.load import load_root

IDS = torch.arange(1, 12)[None]


def saved(family, folder, **shape):
    model = families.model(family, attn_implementation="eager", **shape)
    model.save_pretrained(folder)
    return str(folder), model


def load(root, **args):
    return load_root(Lineage(root), args)[0]


@pytest.mark.parametrize("family", ["gpt_oss", "mamba", "gemma2"])
def test_a_model_without_sdpa_takes_its_own_attention_and_a_line_says_so(family, tmp_path, caplog):
    root, made = saved(family, tmp_path / "root")
    model = load(root, attn_implementation="sdpa")
    if family != "gemma2":  # transformers 4 claims that it has
        assert "has no attention by sdpa; its own (eager) is taken" in caplog.text
    assert model.config._attn_implementation == "eager"
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IDS).logits, made(IDS).logits)


@pytest.mark.parametrize("asked", [{}, {"attn_implementation": "sdpa"}])
def test_the_cap_on_attention_is_not_left_out(asked, tmp_path):
    # so low that logits without it are others; sdpa of transformers 4 knows none
    root, made = saved("gemma2", tmp_path / "root", attn_logit_softcapping=1.0)
    with torch.no_grad():
        torch.testing.assert_close(load(root, **asked).eval()(IDS).logits, made(IDS).logits)


def test_another_attention_that_is_not_there_is_refused(tmp_path):
    root, _ = saved("gpt_oss", tmp_path / "root")
    with pytest.raises(InputError, match="cannot be loaded|package is missing"):
        load(root, attn_implementation="flash_attention_2")


@pytest.mark.parametrize(
    "dtype, multiplies, said",
    [
        (torch.bfloat16, False, ["The weights are in bfloat16"]),
        (torch.float16, False, ["The weights are in float16"]),
        (torch.bfloat16, True, []),
        (torch.float32, False, []),
    ],
)
def test_a_line_says_where_half_precision_is_slow(
    dtype, multiplies, said, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("unlora.model.load._multiplies", lambda half: multiplies)
    families.model("llama").to(dtype).save_pretrained(tmp_path / "root")
    load(str(tmp_path / "root"), torch_dtype=dtype)
    assert [line.split(",")[0] for line in caplog.messages if "many times slower" in line] == said
