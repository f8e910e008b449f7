"""Quantised base weights: what is refused before weights are read, and what is right in memory.

Tests of bitsandbytes itself run where it is installed (``make test-qlora``).
"""

import importlib
import json
import logging
import shutil
from importlib import metadata
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from unlora.api import load
from unlora.config.resolve import model_section
from unlora.errors import InputError
from unlora.model import check_model, fingerprints, get_model, resolve_model
from unlora.model.lineage import Lineage
from unlora.model.load import load_args, load_root
from unlora.model.lora import describe_size, save_adapter
from unlora.model.quantised import SETTINGS, check_training, count, require_package

WIDE = {"hidden_size": 64, "intermediate_size": 128}  # several blocks of nf4 in a row
LORA = {"r": 2, "target_modules": ["q_proj", "down_proj", "lm_head"], "lora_dropout": 0.0}
RAW = {"load_in_4bit": True}
E4M3 = torch.float8_e4m3fn


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return saved(tiny.llama(**WIDE), tmp_path_factory.mktemp("quantised") / "root")


@pytest.fixture
def root(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "root"))


def saved(model, folder):
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def section(path, *, use_lora=True, lora=LORA, lineage="auto", asked=None, **model_args):
    args = {"pretrained_model_name_or_path": str(path), "torch_dtype": "float32", **model_args}
    content = {"model_args": args, "use_lora": use_lora, "lora_config": lora, "lineage": lineage}
    return model_section(content | ({"quantisation": asked} if asked else {}))


def says_quantised(folder, **settings):
    """A model whose config.json says how its weights are quantised."""
    file = folder / "config.json"
    content = json.loads(file.read_text()) | {"quantization_config": settings}
    file.write_text(json.dumps(content))
    return folder


def sentence(call, *args, **kwargs):
    with pytest.raises(InputError) as error:
        call(*args, **kwargs)
    text = str(error.value)
    assert "\n" not in text and text.endswith(".")
    return text


def as_if_installed(monkeypatch, version="0.50.2"):
    """bitsandbytes, as far as its presence is asked about."""
    found = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: version if name == "bitsandbytes" else found(name)
    )
    imported = importlib.import_module
    monkeypatch.setattr(
        importlib,
        "import_module",
        lambda name, *above: None if name == "bitsandbytes" else imported(name, *above),
    )


def identities(model):
    return fingerprints.identities(resolve_model(model))


# --- refused, before any weights -----------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}},
        {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4, "zero_point": True},
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        {"quant_method": "auto-round", "bits": 4},
        {"quant_method": "quanto", "weights": "int8"},
        {"quant_method": "nvfp4"},
        {"quant_method": "of_my_own", "bits": 3},
        {"bits": 3},
    ],
    ids=lambda settings: str(settings.get("quant_method")),
)
def test_weights_quantised_in_another_way_are_refused_by_name(root, settings):
    (root / "model.safetensors").unlink()  # the answer comes before any are read
    found = sentence(check_model, section(says_quantised(root, **settings)))
    assert f"quantised by {settings.get('quant_method')}, which is not supported" in found
    assert "model.quantisation=nf4" in found


@pytest.mark.parametrize("asked", [{"asked": "int8"}, {"quantization_config": RAW}])
def test_quantised_weights_are_not_quantised_anew(root, asked):
    says_quantised(root, quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4")
    found = sentence(check_model, section(root, **asked))
    assert "quantised already (bitsandbytes)" in found and "Leave out" in found


def test_one_says_only_once_how_weights_are_quantised(root):
    found = sentence(load_args, section(root, asked="nf4", quantization_config=RAW))
    assert "model.quantisation is nf4" in found and "Leave out one" in found


@pytest.mark.parametrize("given", ["nf5", "4bit", "fp8", "NF4", 4, True])
def test_there_are_two_ways_to_quantise(root, given):
    found = sentence(section, root, asked=given)
    assert found.startswith("Unknown model.quantisation") and "Known: int8, nf4" in found


@pytest.mark.parametrize(
    "raw, words",
    [
        ({}, None),
        ({"load_in_4bit": True, "load_in_8bit": True}, "both are set"),
        ({"bnb_4bit_quant_type": "nf4"}, "none is set"),
        ({"load_in_4bit": False}, "none is set"),
        (RAW | {"bnb_4bit_quant_type": "nf5"}, "Did you mean 'nf4'"),
        (RAW | {"bnb_4bit_compute_dtype": "float31"}, "Did you mean 'float32'"),
        (RAW | {"bnb_4bit_quant_storage": "int4"}, "Known: bfloat16"),
        (RAW | {"bnb_4bit_use_double_quant": "yes"}, "must be a boolean"),
        (RAW | {"load_in_4bits": True}, "Did you mean 'load_in_4bit'"),
        ({"load_in_8bit": "true"}, "must be a boolean"),
        ({"load_in_8bit": True, "llm_int8_threshold": "six"}, "must be a float"),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "Leave it out"),
    ],
)
def test_settings_of_bitsandbytes_are_checked_before_it_is_needed(root, raw, words):
    asked = section(root, quantization_config=raw)
    if words is None:  # nothing is asked for
        assert check_model(asked).lineage.root == str(root)
    else:
        assert words in sentence(check_model, asked)


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("kind, raw", [("nf4", None), ("int8", None), ("fp4", RAW)])
def test_without_the_package_one_is_told_what_to_install(root, monkeypatch, kind, raw):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    found = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: (missing if name == "bitsandbytes" else found)(name)
    )
    asked = section(root, **({"quantization_config": raw} if raw else {"asked": kind}))
    for door in (check_model, identities, get_model):
        text = sentence(door, asked)
        assert f"{kind} weights need bitsandbytes" in text and "unlora[qlora]" in text
    words = {"quantization_config": raw} if raw else {"quantisation": kind}
    assert f"{kind} weights need" in sentence(load, str(root), **words)


def test_a_package_that_is_too_old_is_refused(monkeypatch):
    as_if_installed(monkeypatch, "0.45.3")
    assert "0.45.3 is too old" in sentence(require_package, SETTINGS["nf4"])
    as_if_installed(monkeypatch, "0.50.2")
    require_package(SETTINGS["nf4"])
    require_package({})  # nothing is quantised


@pytest.mark.parametrize("raw", [None, RAW])
def test_quantised_weights_are_trained_by_adapters_alone(root, monkeypatch, raw):
    as_if_installed(monkeypatch)
    asked = {"quantization_config": raw} if raw else {"asked": "nf4"}
    assert "cannot be trained in full" in sentence(
        check_model, section(root, use_lora=False, **asked)
    )
    pissa = LORA | {"init_lora_weights": "pissa"}
    assert "pissa computes with the weights" in sentence(
        check_model, section(root, lora=pissa, **asked)
    )
    assert "PerTA computes with the weights" in sentence(
        check_model, section(root, **asked), by=["PerTA"]
    )
    assert check_model(section(root, **asked)).lineage.root == str(root)


def test_earlier_adapters_are_not_merged_into_quantised_weights(root):
    merging = section(root, lineage="merge")
    found = sentence(check_training, SETTINGS["int8"], merging, merges=True)
    assert "Set model.lineage=stack" in found
    check_training(SETTINGS["int8"], merging, merges=False)
    check_training({}, merging, merges=True, by=["PerTA"])


# --- as a model was trained ----------------------------------------------------------------------


@pytest.fixture
def run(root, tmp_path):
    """A run on nf4 weights; its adapter was made without them."""
    model, tokenizer = get_model(section(root))
    save_adapter(model, tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    template = {"template_args": {"apply_chat_template": True}}
    written = section(root, asked="nf4").model_dump() | template
    (tmp_path / "run" / "run_config.json").write_text(json.dumps({"model": written}))
    return tmp_path / "run"


def test_a_run_is_asked_on_weights_like_those_it_was_trained_on(run):
    def asked(**more):
        args = {"pretrained_model_name_or_path": str(run), **more.pop("args", {})}
        return resolve_model({"model_args": args, "as_trained": True, **more}).section

    assert asked().quantisation == "nf4"
    assert asked(quantisation="int8").quantisation == "int8"
    plain = asked(quantisation=None)
    assert plain.quantisation is None and "quantization_config" not in load_args(plain)
    raw = asked(args={"quantization_config": RAW})
    assert raw.quantisation is None and load_args(raw)["quantization_config"] == RAW


def test_an_adapter_on_other_weights_than_its_own_is_told(run, caplog):
    with caplog.at_level(logging.WARNING):
        get_model(section(run), trainable=False)
    (said,) = [r.getMessage() for r in caplog.records if "was trained on" in r.getMessage()]
    assert "trained on nf4 weights and is put on unquantised ones" in said
    assert "model.quantisation=nf4 has it as it was" in said


def test_answers_are_kept_under_the_version_of_the_package(root, monkeypatch):
    as_if_installed(monkeypatch, "0.50.2")
    one = identities(section(root, asked="nf4"))
    assert one == identities(section(root, asked="nf4"))
    assert one != identities(section(root, asked="int8")) != identities(section(root))
    as_if_installed(monkeypatch, "0.50.3")
    assert identities(section(root, asked="nf4")) != one


# --- weights that are loaded as what they stand for ----------------------------------------------


def fp8(model, folder):
    """The model with a file of fp8 weights and a scale for each, as DeepSeek's and Qwen's are."""
    saved(model.to(torch.bfloat16), folder)
    file, exact = folder / "model.safetensors", {}
    weights = load_file(file)
    for name in [name for name in weights if "_proj" in name]:
        scale = weights[name].float().abs().max() / 448
        weights[name] = (weights[name].float() / scale).to(E4M3)
        exact[name] = weights[name].float() * scale
        weights[name + "_scale_inv"] = scale.reshape(1, 1)
    save_file(weights, file, metadata={"format": "pt"})
    says_quantised(folder, quant_method="fp8", weight_block_size=[128, 128], fmt="e4m3")
    return exact


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 cannot dequantise fp8")
def test_fp8_weights_are_loaded_as_what_they_stand_for(tmp_path, caplog):
    exact = fp8(tiny.llama(**WIDE), tmp_path / "fp8")
    asked = section(tmp_path / "fp8", torch_dtype="bfloat16")
    with caplog.at_level(logging.INFO):
        model, _ = get_model(asked)
    assert "the weights are fp8, and are dequantised" in caplog.text
    state = {
        n.removeprefix("base_model.model.").replace("base_layer.", ""): w
        for n, w in model.named_parameters()
    }
    for name, weight in exact.items():
        assert torch.equal(state[name], weight.to(torch.bfloat16))
    assert not getattr(model.get_base_model().config, "quantization_config", None)
    # and they are trained in full, and merged, like any others
    assert check_model(section(tmp_path / "fp8", use_lora=False))


NIBBLES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def mxfp4(model, folder):
    """The model with the experts as gpt-oss has them: two numbers a byte, a scale for each 32."""
    saved(model.to(torch.bfloat16), folder)
    file, exact = folder / "model.safetensors", {}
    weights = load_file(file)
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        by_block = weights.pop(name).mT.float().unflatten(-1, (-1, 32))
        power = by_block.abs().amax(-1).log2().floor() - 2
        scaled = by_block / 2 ** power[..., None]
        code = (scaled[..., None] - NIBBLES).abs().argmin(-1).to(torch.uint8)
        weights[name + "_blocks"] = code[..., ::2] | code[..., 1::2] << 4
        weights[name + "_scales"] = (power + 127).to(torch.uint8)
        exact[name] = (NIBBLES[code.long()] * 2 ** power[..., None]).flatten(-2).mT
    save_file(weights, file, metadata={"format": "pt"})
    says_quantised(folder, quant_method="mxfp4", modules_to_not_convert=["lm_head"])
    return exact


def test_mxfp4_weights_are_loaded_as_what_they_stand_for(tmp_path):
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    shape = {**tiny.SHAPE, **WIDE, "head_dim": 16, "intermediate_size": 64}
    config = GptOssConfig(**shape, num_local_experts=2, num_experts_per_tok=1, sliding_window=16)
    exact = mxfp4(GptOssForCausalLM(config), tmp_path / "gpt-oss")
    args = load_args(section(tmp_path / "gpt-oss", torch_dtype="bfloat16"))
    lineage = Lineage.read(args.pop("pretrained_model_name_or_path"))
    state = dict(load_root(lineage, args)[0].named_parameters())
    assert exact.keys() <= state.keys() and len(exact) == 4
    for name, weight in exact.items():
        assert torch.equal(state[name].float(), weight)


# --- bitsandbytes itself -------------------------------------------------------------------------


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def some_ids(rows=3, length=9):
    return torch.arange(rows * length).reshape(rows, length) * 7919 % tiny.VOCABULARY


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_evaluation_leaves_quantised_weights_trainable(bitsandbytes, root, monkeypatch, kind):
    """As on a processor with AVX512-BF16, for which bitsandbytes packs 4-bit weights anew."""
    modules = importlib.import_module("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    model, _ = get_model(section(root, asked=kind))
    weight = model.get_base_model().model.layers[0].mlp.up_proj.weight
    before, ids = weight.data.clone(), some_ids()
    first = logits(model.eval(), ids)
    assert weight.data.shape == before.shape and torch.equal(weight.data, before)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    moved = [p.grad.abs().max() for n, p in model.named_parameters() if "lora_B" in n]
    assert len(moved) == 5 and all(moved)
    # bitsandbytes rounds the inputs of int8 weights in eval mode, but not in training
    assert torch.equal(logits(model.train(), ids), first)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_answer_does_not_depend_on_the_rows_beside_it(bitsandbytes, root, kind):
    model, _ = get_model(section(root, asked=kind), trainable=False)
    ids = some_ids()
    together = logits(model, ids)
    alone = torch.cat([logits(model, row[None]) for row in ids])
    assert torch.allclose(together, alone, atol=1e-4)


def dequantised(base):
    """The same model with its quantised weights as plain numbers."""
    plain = base.dequantize()
    for attribute in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(plain).pop(attribute, None)
    return plain


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_weights_dequantised_answer_and_learn_as_the_quantised_ones(bitsandbytes, root, kind):
    args = load_args(section(root, asked=kind))
    lineage = Lineage.read(args.pop("pretrained_model_name_or_path"))
    ids, found = some_ids(), {}
    for form in ("quantised", "plain"):
        base = load_root(lineage, args)[0]
        model = base if form == "quantised" else dequantised(base)
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        said = model(inputs_embeds=embedded).logits
        said.square().sum().backward()
        found[form] = said.detach(), embedded.grad
        assert {type(m) for m in model.modules() if isinstance(m, torch.nn.Linear)} == (
            {torch.nn.Linear}
            if form == "plain"
            else {torch.nn.Linear, type(model.model.layers[0].mlp.up_proj)}
        )
    for quantised, plain in zip(found["quantised"], found["plain"], strict=True):
        assert torch.allclose(quantised, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))
    original = logits(tiny.llama(**WIDE), ids)
    error = float((found["plain"][0] - original).norm() / original.norm())
    assert 1e-3 < error < (0.5 if kind == "nf4" else 0.1)


def test_the_first_question_does_not_change_the_biases(bitsandbytes, tmp_path):
    folder = saved(tiny.qwen2(**WIDE).to(torch.bfloat16), tmp_path / "qwen")
    raw = RAW | {"bnb_4bit_compute_dtype": "float32"}  # as is usual where nothing is set
    asked = section(folder, torch_dtype="bfloat16", quantization_config=raw)
    model, _ = get_model(asked, trainable=False)
    bias = model.model.layers[0].self_attn.k_proj.bias
    before = bias.dtype
    logits(model, some_ids())
    assert bias.dtype == before == torch.float32


def test_the_head_is_never_quantised(bitsandbytes, tmp_path):
    """transformers' own list of what is left out has it; a list of the user's has not."""
    folder = saved(tiny.qwen2(**WIDE), tmp_path / "tied")
    raw = RAW | {"llm_int8_skip_modules": ["q_proj"]}
    model, _ = get_model(section(folder, quantization_config=raw), trainable=False)
    attention = model.model.layers[0].self_attn
    assert type(attention.q_proj) is type(model.lm_head) is torch.nn.Linear
    assert isinstance(attention.k_proj, bitsandbytes.nn.Linear4bit)
    assert logits(model, some_ids()).isfinite().all()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("gone", ["layers.0.mlp.up_proj", "layers.1.input_layernorm"])
def test_weights_that_are_missing_are_not_drawn(bitsandbytes, root, kind, gone):
    file = root / "model.safetensors"
    kept = {name: x for name, x in load_file(file).items() if gone not in name}
    save_file(kept, file, metadata={"format": "pt"})
    assert f"has no weights for model.{gone}" in sentence(get_model, section(root, asked=kind))


def test_packed_weights_are_counted_as_they_are_unpacked(bitsandbytes, root, tmp_path):
    model, _ = get_model(section(root, asked="nf4"))
    save_adapter(model, tmp_path / "run")
    whole = sum(p.numel() for p in tiny.llama(**WIDE).parameters())
    assert sum(count(p) for n, p in model.named_parameters() if "lora_" not in n) == whole
    assert f"beside {whole:,} frozen ones" in describe_size(model, tmp_path / "run")


def test_the_dtype_of_the_model_is_computed_in(bitsandbytes, root):
    for dtype in ("float32", "bfloat16"):
        model, _ = get_model(section(root, asked="nf4", torch_dtype=dtype), trainable=False)
        assert model.model.layers[0].mlp.up_proj.compute_dtype == getattr(torch, dtype)


def test_a_model_that_comes_quantised_is_used_as_it_is(bitsandbytes, root, tmp_path):
    args = load_args(section(root, asked="nf4"))
    base, _ = load_root(Lineage.read(args.pop("pretrained_model_name_or_path")), args)
    came = saved(base, tmp_path / "came")
    model, _ = get_model(section(came), trainable=False)
    assert torch.equal(logits(model, some_ids()), logits(base.eval(), some_ids()))
    assert "cannot be trained in full" in sentence(check_model, section(came, use_lora=False))
    assert "quantised already" in sentence(check_model, section(came, asked="nf4"))
