"""A GGUF file is a root model: the same weights, tokenizer and template; or one sentence."""

import json
import sys

import families
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from unlora.cli.main import main
from unlora.errors import InputError
from unlora.model import get_model, resolve_model
from unlora.model import gguf as reading

IDS = torch.arange(1, 12)[None]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
WORDS = [*"abcdefghijklmnopqrstuvwxyz", "Ġ", "Ċ", "ab", "Ġab", "</s>"]


@pytest.fixture
def gguf(monkeypatch, tmp_path):
    monkeypatch.setenv("UNLORA_CACHE", str(tmp_path / "cache"))
    reading.model_folder.cache_clear()
    return pytest.importorskip("gguf")


def write(gguf, file, *, quantised=False, architecture="llama"):
    """A tiny Llama as llama.cpp would convert it, and the model itself."""
    model = families.model("llama", vocab_size=len(WORDS), hidden_size=64, intermediate_size=64)
    config = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([1] * len(WORDS))
    writer.add_token_merges(["a b", "Ġ ab"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(len(WORDS) - 1)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        values = weight.float().numpy()
        for part, heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", config.num_key_value_heads),
        ):
            if part in name:  # llama.cpp pairs the dimensions of a rotation otherwise
                halves = values.reshape(heads, 2, -1, values.shape[1])
                values = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
        kind = None
        if quantised and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            values = gguf.quantize(values, kind)
        writer.add_tensor(names.get_name(name, (".weight",)), values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def section(path):
    return {"model_args": {"pretrained_model_name_or_path": str(path), "torch_dtype": "float32"}}


def test_a_model_is_the_same_out_of_a_gguf_file(gguf, tmp_path):
    model = write(gguf, tmp_path / "tiny.gguf")
    read, tokenizer = get_model(resolve_model(section(tmp_path / "tiny.gguf")))
    with torch.no_grad():
        torch.testing.assert_close(read.eval()(IDS).logits, model.eval()(IDS).logits)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.decode(tokenizer("ab ab", add_special_tokens=False).input_ids) == "ab ab"


def test_a_file_is_read_once_and_a_line_says_how_its_weights_were_rounded(gguf, tmp_path, caplog):
    caplog.set_level("INFO", "unlora")
    file = tmp_path / "tiny.gguf"
    write(gguf, file, quantised=True)
    folder = reading.model_folder(str(file))
    assert "were rounded to Q8_0 (8.6 bits each), now in bfloat16" in caplog.text
    settings = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in settings and settings["dtype"] == "bfloat16"
    written = (folder / "model.safetensors").stat().st_mtime_ns
    reading.model_folder.cache_clear()
    assert reading.model_folder(str(file)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE


def test_a_file_that_cannot_be_read_is_one_sentence(gguf, tmp_path):
    whole = tmp_path / "tiny.gguf"
    write(gguf, whole)
    content = whole.read_bytes()
    for size in (5, 30, len(content) // 2, len(content) - 100):
        cut = tmp_path / f"cut{size}.gguf"
        cut.write_bytes(content[:size])
        with pytest.raises(InputError, match="is damaged or was cut short"):
            reading.model_folder(str(cut))
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(InputError, match="is no GGUF file"):
        reading.model_folder(str(tmp_path / "text.gguf"))
    write(gguf, tmp_path / "other.gguf", architecture="martian")
    with pytest.raises(InputError, match=r"cannot read .* architecture martian is not supported"):
        reading.model_folder(str(tmp_path / "other.gguf"))
    assert not [entry for entry in (tmp_path / "cache/gguf").iterdir() if entry.is_dir()]


def test_without_the_package_a_sentence_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(reading.metadata, "version", _no_package)
    (tmp_path / "tiny.gguf").touch()
    monkeypatch.chdir(tmp_path)
    for typed in (["chat", "tiny.gguf"], ["fetch-model", "smollm2"]):
        with pytest.raises(SystemExit, match="2"):
            main(typed)
        said = capsys.readouterr().err
        assert said == (
            "To read a GGUF file the package gguf is needed. Run: pip install 'unlora[gguf]'.\n"
        )


def _no_package(name):
    raise reading.metadata.PackageNotFoundError(name)


def test_a_missing_file_is_one_sentence():
    with pytest.raises(InputError, match="There is no file 'nowhere.gguf' to load a model from"):
        reading.model_folder("nowhere.gguf")
