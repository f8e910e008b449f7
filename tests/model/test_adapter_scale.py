"""Scaling the last adapter: exact in memory, the same as a run folder, or refused in a sentence."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from model.test_experts import MIXTRAL, fused
from model.test_lora import disturb, run_folder
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Conv1d, Embedding, LoraLayer, ParamWrapper
from plain_adapters import edit, make_adapter, make_root
from tiny import LORA, VOCABULARY, adapted, llama
from torch import nn
from transformers import AutoModelForCausalLM

from unlora.errors import GuardError, InputError
from unlora.model import adapter_scale, get_model
from unlora.model.adapter_init import lora_layers
from unlora.model.adapter_scale import scaled, why_not_scalable, write_scaled
from unlora.model.attach import load_model
from unlora.model.guards import start_equals_target
from unlora.model.lineage import Lineage
from unlora.model.lora import LoRAModelForCausalLM
from unlora.model.probe import Probe
from unlora.model.reference import adapters_off, last_link_off
from unlora.model.standalone import export

IDS = torch.arange(40).reshape(2, 20) * 7 % VOCABULARY
# rank 3: alpha / r and alpha / sqrt(r) are no short binary fractions
KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 3, "lora_alpha": 5},
    "patterns": {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"q_proj": 2, "down_proj": 3}},
    "rslora patterns": {
        "use_rslora": True, "alpha_pattern": {"v_proj": 7}, "rank_pattern": {"v_proj": 3},
    },
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}  # fmt: skip


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def states(model):
    scalings = {name: dict(layer.scaling) for name, layer in lora_layers(model).items()}
    return scalings, {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_same_states(before, after):
    assert before[0] == after[0] and before[1].keys() == after[1].keys()
    assert all(torch.equal(weight, after[1][name]) for name, weight in before[1].items())


def literal(model, scale, **config):
    """The same model as plain weights, W + scale * s * B A with s by hand."""
    plain = model.get_base_model()
    heads = plain.get_output_embeddings(), plain.get_input_embeddings()
    weights = {}
    for name, layer in lora_layers(model).items():
        key = next((k for k in config.get("alpha_pattern", {}) if name.endswith(k)), None)
        alpha = config.get("alpha_pattern", {}).get(key, config["lora_alpha"])
        if layer.lora_embedding_A:
            a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
            rank, delta = len(a), (b @ a).T
        else:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            rank, delta = len(a), b @ a
        s = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        weights[f"{name}.weight"] = layer.get_base_layer().weight + scale * s * delta
    tied = heads[0].weight is heads[1].weight
    other = llama(tied=tied, dtype=plain.dtype)
    if tied:  # an adapter on the one of two that share their weights must not change the other
        other.lm_head.weight = nn.Parameter(other.lm_head.weight.detach().clone())
    missing = other.load_state_dict({n: w.detach() for n, w in weights.items()}, strict=False)
    assert not missing.unexpected_keys
    return other


@pytest.mark.default_cases(6)
@pytest.mark.parametrize("scale", [0.3, 1.25])
@pytest.mark.parametrize(
    "kind, tied", [*((kind, False) for kind in KINDS), ("plain", True), ("embedding", True)]
)
def test_a_scaled_adapter_is_the_weights_plus_so_much_of_its_product(kind, tied, scale):
    config = {**LORA, **KINDS[kind]}
    for dtype, error in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        model = adapted(llama(tied=tied, dtype=dtype), **config).to(dtype)
        for layer in lora_layers(model).values():
            for factor in (layer.lora_embedding_A, layer.lora_embedding_B):
                for weight in factor.values():
                    nn.init.normal_(weight, std=0.1)
        trained, expected = logits(model), logits(literal(model, scale, **config))
        assert (trained - expected).abs().max() > 0.05
        with scaled(model, "default", scale):
            torch.testing.assert_close(logits(model), expected, rtol=0, atol=error)


def test_scale_one_is_the_model_and_scale_zero_the_adapter_off_bit_for_bit():
    model = adapted(r=3, lora_alpha=5)
    trained, before = logits(model), states(model)
    with adapters_off(model):
        off = logits(model)
    with scaled(model, "default", 1):
        assert torch.equal(logits(model), trained)
    with scaled(model, "default", 0):
        assert torch.equal(logits(model), off) and not torch.equal(off, trained)
    assert_same_states(before, states(model))
    assert torch.equal(logits(model), trained)


def test_everything_is_as_before_after_an_exception():
    model = adapted(r=3, lora_alpha=5)
    before = states(model)
    with pytest.raises(RuntimeError, match="inside"), scaled(model, "default", 0.1):
        with scaled(model, "default", 0.7):
            scaling = lora_layers(model)["lm_head"].scaling["default"]
            assert scaling == pytest.approx(5 / 3 * 0.07)
        raise RuntimeError("inside")
    assert_same_states(before, states(model))


def test_what_would_not_be_scaled_is_refused():
    model = adapted()
    for wrong in ("other", "link0"):
        with pytest.raises(ValueError, match=f"'{wrong}' cannot be scaled.*one of .'default'"):
            scaled(model, wrong, 0.5).__enter__()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerged"):
        scaled(model, "default", 0.5).__enter__()
    with pytest.raises(ValueError, match="must be plain LoRA"):
        scaled(adapted(use_dora=True), "default", 0.5).__enter__()


@pytest.mark.skipif(not fused(MIXTRAL), reason="experts are modules in this transformers")
def test_adapters_on_parameters_are_scaled(tmp_path):
    torch.manual_seed(0)
    on = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    plain = AutoModelForCausalLM.from_config(MIXTRAL)
    model = disturb(get_peft_model(plain, LoraConfig(**{**LORA, **on})))
    with adapters_off(model):
        off = logits(model)
    experts = next(m for m in model.modules() if isinstance(m, ParamWrapper))
    delta = experts.get_delta_weight("default")
    with scaled(model, "default", 0):
        torch.testing.assert_close(logits(model), off, rtol=0, atol=0)
    with scaled(model, "default", 0.5):
        half = logits(model)
        torch.testing.assert_close(experts.get_delta_weight("default"), delta / 2)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data *= 0.5
    assert (logits(model) - off).abs().max() > 0.01
    torch.testing.assert_close(logits(model), half, rtol=0, atol=1e-5)


def test_adapters_on_embeddings_and_convolutions_are_scaled():
    body = nn.Sequential()
    body.add_module("table", nn.Embedding(9, 4))
    body.add_module("conv", nn.Conv1d(5, 6, 3))
    model = get_peft_model(
        body, LoraConfig(r=3, lora_alpha=5, target_modules=["table", "conv"]), "mine"
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    kinds = {type(module) for module in model.modules()}
    assert {Embedding, Conv1d} <= kinds
    deltas = [m.get_delta_weight("mine") for m in model.modules() if hasattr(m, "scaling")]
    with scaled(model, "mine", 0.5):
        halves = [m.get_delta_weight("mine") for m in model.modules() if hasattr(m, "scaling")]
        ids, (table, conv) = torch.arange(5)[None], deltas
        weights = body.table.get_base_layer().weight + table / 2
        states = nn.functional.embedding(ids, weights)
        conv_weight = body.conv.get_base_layer().weight + conv / 2
        expected = nn.functional.conv1d(states, conv_weight, body.conv.get_base_layer().bias)
        torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(half, delta / 2) for half, delta in zip(halves, deltas, strict=True))


# --- as a run folder -----------------------------------------------------------------------------


def make_run(folder, path, *, lineage="stack", **config):
    model = disturb(LoRAModelForCausalLM.from_pretrained(path, LORA | config, lineage=lineage))
    run_folder(folder.parent, folder.name, model)
    output = str(folder)
    written = {
        "model": {
            "model_args": {"pretrained_model_name_or_path": path, "torch_dtype": "float32"},
            "template_args": {"apply_chat_template": True, "system_prompt": "Be short."},
            "lineage": lineage,
        },
        "trainer": {"args": {"output_dir": output, "notes": f"{output} and more"}},
        "paths": {"output_dir": output},
        "mode": "unlearn",
        "task_name": folder.name,
    }
    (folder / "run_config.json").write_text(json.dumps(written))
    (folder / "manifest.json").write_text("{}")
    (folder / "checkpoint-4").mkdir()
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A root, a target on it, and an unlearning run on that."""
    folder = tmp_path_factory.mktemp("runs")
    target = make_run(folder / "target", make_root(folder / "root", llama(tied=True)))
    make_run(folder / "npo", str(target), r=3, lora_alpha=5, alpha_pattern={"q_proj": 3})
    return folder


def asked(folder):
    section = {"model_args": {"pretrained_model_name_or_path": str(folder)}, "as_trained": True}
    return get_model(section, trainable=False)


def content(file):
    return json.loads(file.read_text())


def test_a_scaled_run_answers_as_its_origin_with_the_last_adapter_scaled(runs, tmp_path):
    model, _ = asked(runs / "npo")
    with last_link_off(model):
        below = logits(model)
    with scaled(model, "link1", 0.8):
        expected = logits(model)
    folder = write_scaled(runs / "npo", 0.8, tmp_path / "npo-dial-0.8")
    written, tokenizer = asked(folder)
    assert (logits(model) - expected).abs().max() > 0.01
    torch.testing.assert_close(logits(written), expected, rtol=0, atol=1e-5)
    with last_link_off(written):
        torch.testing.assert_close(logits(written), below, rtol=0, atol=0)
    assert tokenizer.chat_template and list(written.peft_config) == ["link0", "link1"]


def test_a_scaled_run_says_what_it_is_and_holds_the_same_weights(runs, tmp_path):
    origin, folder = runs / "npo", tmp_path / "new" / "npo-dial-0.8"
    assert write_scaled(str(origin), 0.8, str(folder)) == folder
    names, before = ({path.name for path in f.iterdir()} for f in (folder, origin))
    assert names == before - {"checkpoint-4", "exported"}
    for name in ("adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (origin / name).read_bytes()
    before, now = (content(f / "adapter_config.json") for f in (origin, folder))
    assert now == before | {"lora_alpha": 5 * 0.8, "alpha_pattern": {"q_proj": 3 * 0.8}}
    links, manifest = content(origin / "lineage.json")["links"], content(folder / "manifest.json")
    scaled_as = manifest["scaled"]
    assert (folder / scaled_as["origin"]).resolve() == origin.resolve()
    assert (scaled_as["sha256"], scaled_as["scale"]) == (links[-1]["sha256"], 0.8)
    assert "differ" in manifest["guards"]["written equals scaled"]
    written = content(folder / "lineage.json")
    assert [link["sha256"] for link in written["links"]] == [link["sha256"] for link in links]
    assert written["links"][-1]["path"] == "."
    config, old = content(folder / "run_config.json"), content(origin / "run_config.json")
    assert config["model"] == old["model"] and config["mode"] == "unlearn"
    assert config["paths"]["output_dir"] == config["trainer"]["args"]["output_dir"] == str(folder)
    assert config["task_name"] == "npo-dial-0.8"
    assert config["trainer"]["args"]["notes"] == f"{origin} and more"
    assert {path.name for path in folder.parent.iterdir()} <= {folder.name, f".{folder.name}.lock"}


@pytest.mark.parametrize("scale", [0, 1])
def test_a_run_scaled_by_nothing_or_as_it_was_is_the_model_before_or_after(runs, tmp_path, scale):
    model, _ = asked(runs / "npo")
    written, _ = asked(write_scaled(runs / "npo", scale, tmp_path / "scaled"))
    if scale == 1:
        assert torch.equal(logits(written), logits(model))
    else:
        with last_link_off(model):
            assert torch.equal(logits(written), logits(model))


@pytest.mark.slow
def test_a_scaled_run_is_exported_and_unlearnt_further(runs, tmp_path):
    folder = write_scaled(runs / "npo", 0.5, tmp_path / "half")
    probe = Probe.of(asked(folder)[0])
    merged = AutoModelForCausalLM.from_pretrained(export(str(folder), "merged"))
    assert probe.compared(merged).same(1e-4)
    further = LoRAModelForCausalLM.from_pretrained(str(folder), LORA, lineage="merge")
    start_equals_target(further, further.target)
    assert probe.difference(further)[1] < 1e-4


def test_what_started_from_the_weights_is_scaled_from_where_it_started(runs, tmp_path):
    """What is saved is trained minus start, so a half is half way between the two."""
    run = make_run(tmp_path / "run", str(runs / "root"), lineage="auto", init_lora_weights="pissa")
    assert why_not_scalable(run) is None
    assert content(run / "adapter_config.json")["r"] == 2 * LORA["r"]
    model = asked(run)[0].double()
    start, half = llama(tied=True).double(), llama(tied=True).double()
    half.lm_head.weight = nn.Parameter(half.lm_head.weight.detach().clone())
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            half.get_submodule(name).weight.data += 0.5 * layer.get_delta_weight("link0")
    with scaled(model, "link0", 0.5):
        torch.testing.assert_close(logits(model), logits(half), rtol=0, atol=1e-10)
    with scaled(model, "link0", 0):
        torch.testing.assert_close(logits(model), logits(start), rtol=0, atol=1e-12)
    written = asked(write_scaled(run, 0.5, tmp_path / "half"))[0].double()
    torch.testing.assert_close(logits(written), logits(half), rtol=0, atol=1e-10)


def test_an_adapter_of_another_program_is_scaled(runs, tmp_path):
    adapter = make_adapter(make_root(tmp_path / "root"), tmp_path / "adapter", use_rslora=True)
    folder = write_scaled(adapter, 0.5, tmp_path / "half")
    model, _ = load_model(Lineage.read(str(adapter)), {})
    with scaled(model, "link0", 0.5):
        expected = logits(model)
    torch.testing.assert_close(logits(asked(folder)[0]), expected, rtol=0, atol=1e-5)
    assert not (folder / "run_config.json").exists()


@pytest.mark.parametrize("factor", [2, 1.1], ids=["not scaled at all", "a little otherwise"])
def test_a_written_run_that_answers_otherwise_is_not_kept(runs, tmp_path, monkeypatch, factor):
    correct = adapter_scale._scaled_settings
    monkeypatch.setattr(
        adapter_scale, "_scaled_settings", lambda settings, scale: correct(settings, scale * factor)
    )
    with pytest.raises(GuardError, match="written equals scaled.*Nothing was written"):
        write_scaled(runs / "npo", 0.5, tmp_path / "half")
    assert not list(tmp_path.iterdir())


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({"use_dora": True}, "use_dora=true: magnitudes that were trained"),
        ({"bias": "lora_only"}, 'bias="lora_only": biases that were trained'),
        ({"lora_bias": True}, "lora_bias=true"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\[\"lm_head\"\]"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights="pissa": it belongs on weights'),
        ({"init_lora_weights": "loftq"}, "Convert it where it was trained"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_what_is_more_than_lora_on_its_model_is_refused(runs, tmp_path, changed, expected):
    run = shutil.copytree(runs / "npo", tmp_path / "npo")
    edit(run, **changed)
    with pytest.raises(InputError, match=expected) as raised:
        write_scaled(run, 0.5, tmp_path / "half")
    assert str(raised.value) == why_not_scalable(run)
    assert not (tmp_path / "half").exists()


def test_a_run_that_continued_an_adapter_is_refused_and_so_are_its_checkpoints(runs, tmp_path):
    run = make_run(tmp_path / "run", str(runs / "target"), lineage="continue")
    checkpoint = shutil.copytree(run, tmp_path / "run" / "checkpoint-8")
    (checkpoint / "run_config.json").unlink()
    for folder in (run, checkpoint):
        reason = why_not_scalable(folder)
        assert "model.lineage=continue" in reason and "both would be scaled" in reason
    assert why_not_scalable(runs / "target") is why_not_scalable(runs / "npo") is None


def test_what_has_no_adapter_is_refused(runs, tmp_path):
    assert "was trained in full" in why_not_scalable(runs / "root")
    assert "has no adapter" in why_not_scalable(tmp_path)
    assert "There is no run folder" in why_not_scalable(tmp_path / "none")


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(runs, tmp_path, scale):
    with pytest.raises(InputError, match=f"The scale is {scale}; it must be a number from 0 on"):
        write_scaled(runs / "npo", scale, tmp_path / "half")


def test_a_link_to_an_empty_folder_is_written_where_it_leads(runs, tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "half").symlink_to(tmp_path / "elsewhere" / "deep")
    folder = write_scaled(runs / "npo", 0.5, tmp_path / "half")
    assert (tmp_path / "half").is_symlink()
    assert len(Lineage.read(str(folder)).links) == 2


def test_a_folder_with_something_in_it_is_left_alone(runs, tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "mine.txt").write_text("mine")
    for taken in (tmp_path / "half", runs / "npo"):
        before = {file: file.read_bytes() for file in Path(taken).rglob("*") if file.is_file()}
        with pytest.raises(InputError, match="is not empty. Give another --output"):
            write_scaled(runs / "npo", 0.5, taken)
        assert {f: f.read_bytes() for f in Path(taken).rglob("*") if f.is_file()} == before
