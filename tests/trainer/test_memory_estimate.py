"""What is estimated from a config is what a loaded model has."""

import json
import re

import pytest
import tiny
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

from unlora.config.schema import Config
from unlora.errors import InputError
from unlora.forward.fused_lora import fuse_lora
from unlora.model import get_model
from unlora.model.lora import save_adapter
from unlora.model.reference import POLICY
from unlora.trainer import largest_batch as module
from unlora.trainer.checkpointing import bound
from unlora.trainer.largest_batch import Batch
from unlora.trainer.memory_estimate import estimate

LENGTHS = [(20, 5), (12, 8), (16, 4)]


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, eos_token_id=1, bos_token_id=1)
    )


MODELS = {
    "llama": (tiny.llama, ["q_proj", "v_proj", "down_proj", "lm_head"]),
    "tied qwen2": (tiny.qwen2, ["q_proj", "k_proj", "lm_head"]),
    "gpt2": (gpt2, ["lm_head"]),
}


@pytest.fixture(autouse=True)
def lengths(monkeypatch):
    monkeypatch.setattr(module, "_lengths", lambda *_: LENGTHS)


def config(folder, *, model=None, trainer="NPO", args=None, method_args=None, plugins=None):
    """A config of an unlearning of the model in this folder."""
    section = {
        "model_args": {"pretrained_model_name_or_path": str(folder), "torch_dtype": "float32"},
        "lora_config": tiny.LORA,
        "use_lora": True,
        "template_args": {"apply_chat_template": True},
    }
    part = {"set": {"handler": "QADataset", "args": {"hf_args": {"path": "x"}, "max_length": 64}}}
    return Config.model_validate(
        {
            "mode": "unlearn",
            "task_name": "x",
            "paths": {"output_dir": "x"},
            "model": section | (model or {}),
            "data": {"forget": part, "retain": part},
            "trainer": {
                "handler": trainer,
                "args": {"per_device_train_batch_size": 2, **(args or {})},
                "method_args": {"retain_loss_type": "NLL"} if method_args is None else method_args,
                "plugins": plugins or {},
            },
        }
    )


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    make, targets = MODELS[request.param]
    make().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    return tmp_path, targets


@pytest.mark.default_cases(1)
def test_parameters_weights_and_file_are_those_of_the_loaded_model(saved, tmp_path):
    folder, targets = saved
    wanted = config(folder, model={"lora_config": {**tiny.LORA, "target_modules": targets}})
    found = estimate(wanted)
    model, _ = get_model(wanted.model)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert found.trained == sum(p.numel() for p in trained) > 0
    assert found.weights == 4 * sum(
        p.numel() for n, p in model.named_parameters() if "lora_" not in n
    )
    assert found.gradients == found.adapter == found.optimiser // 2 == 4 * found.trained
    model.lineage = model.lineage
    save_adapter(model, tmp_path / "run")
    assert found.file == pytest.approx(
        (tmp_path / "run/adapter_model.safetensors").stat().st_size, rel=0.15
    )
    assert found.reference == 0


@pytest.mark.default_cases(2)
def test_a_model_that_is_trained_in_full_needs_a_copy_where_it_is_asked_live(saved):
    folder, _ = saved
    full = {"use_lora": False}
    plain = estimate(config(folder, model=full, trainer="GradDiff"))
    model, _ = get_model(config(folder, model=full).model)
    assert plain.trained == plain.parameters == sum(p.numel() for p in model.parameters())
    assert plain.reference == plain.adapter == 0
    live = estimate(config(folder, model=full, method_args={"retain_loss_type": "KL"}))
    assert live.reference == live.weights == 4 * plain.parameters


@pytest.fixture
def llama(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_adapters_stay_float32_on_bfloat16_weights(llama):
    dtype = {"pretrained_model_name_or_path": str(llama), "torch_dtype": "bfloat16"}
    half, whole = estimate(config(llama, model={"model_args": dtype})), estimate(config(llama))
    assert 2 * half.weights == whole.weights
    assert half.adapter == whole.adapter


@pytest.mark.slow
def test_the_dtype_of_the_weights_is_found(llama):
    file = llama / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}))
    auto = {"pretrained_model_name_or_path": str(llama)}
    found = estimate(config(llama, model={"model_args": auto}))
    assert found.weights == estimate(config(llama)).weights // 2


@pytest.mark.slow
def test_quantised_weights_are_counted_with_their_scales(llama):
    def weights(**settings):
        args = {"pretrained_model_name_or_path": str(llama), "torch_dtype": "bfloat16"}
        model = {"model_args": args | {"quantization_config": settings}}
        return estimate(config(llama, model=model)).weights

    # of each of 2 layers q and o 32x32, k and v 32x16, gate, up and down 32x48
    linear = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    outputs = 2 * (32 + 32 + 16 + 16 + 48 + 48 + 32)
    rest = 2 * (2 * 300 * 32 + 5 * 32)  # embedding, head and norms in bfloat16
    assert weights(load_in_8bit=True) == rest + linear + 4 * outputs
    assert weights(load_in_4bit=True) == rest + linear // 2 + linear // 64 * 4
    double = weights(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    assert rest + linear // 2 < double < weights(load_in_4bit=True)


@pytest.mark.slow
def test_checkpoints_keep_less_and_larger_batches_more(llama):
    plain, kept = (
        estimate(config(llama)),
        estimate(config(llama, args={"gradient_checkpointing": True})),
    )
    assert kept.activations == plain.other_activations < plain.activations == kept.other_activations
    assert plain.batches["forget"] == Batch(2, 20, 13, 16)  # 13: of the two longest answers
    larger = estimate(config(llama, args={"per_device_train_batch_size": 3}))
    assert larger.activations == pytest.approx(1.5 * plain.activations, rel=0.1)
    assert larger.batches["forget"] == Batch(3, 20, 17, 16)


def test_activations_are_those_that_autograd_keeps(llama):
    """Of a real pass, every tensor that is kept and is no parameter, each once."""
    wanted = config(llama, trainer="GradAscent", method_args={})
    model, _ = get_model(wanted.model)
    fuse_lora(model, POLICY)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        hold.append(tensor)
        return tensor

    hold = []
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(input_ids=torch.ones(2, 20, dtype=torch.long), use_cache=False)
    real = sum(size for place, size in kept.items() if place not in own)
    # the estimate projects 13 tokens and not all 40
    assert estimate(wanted).activations == pytest.approx(real, rel=0.1)


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("plugin, sets", [("LoRAPlus", 1), ("SAM", 2), ("GRU", 3)])
def test_composed_steps_hold_more_gradients(llama, plugin, sets):
    found = estimate(config(llama, plugins={plugin: None}))
    assert found.gradients == sets * 4 * found.trained


@pytest.mark.slow
def test_an_objective_on_a_layer_trains_nothing_above_it(llama):
    low = estimate(config(llama, trainer="RMU", method_args={"layer": 0, "alpha": 0}))
    high = estimate(config(llama, trainer="RMU", method_args={"layer": 1, "alpha": 0}))
    assert low.trained * 2 == high.trained < estimate(config(llama)).trained
    assert low.activations < high.activations


@pytest.mark.slow
def test_an_adapter_that_is_continued_or_stacked_or_starts_has_a_second(llama, tmp_path):
    fresh = estimate(config(llama))
    model, tokenizer = get_model(config(llama).model)
    save_adapter(model, tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    own = {"model_args": {"pretrained_model_name_or_path": str(tmp_path / "run")}}
    assert estimate(config(llama, model=own)).adapter == fresh.adapter
    further = estimate(config(llama, model=own | {"lineage": "continue"}))
    assert (further.adapter, further.trained) == (2 * fresh.adapter, fresh.trained)
    stacked = estimate(config(llama, model=own | {"lineage": "stack"}))
    assert stacked.adapter == pytest.approx(2 * fresh.adapter, rel=0.2)
    started = estimate(
        config(llama, model={"lora_config": {**tiny.LORA, "init_lora_weights": "pissa"}})
    )
    assert (started.adapter, started.trained) == (2 * fresh.adapter, fresh.trained)
    with pytest.raises(InputError, match="there is no adapter to continue"):
        estimate(config(llama, model={"lineage": "continue"}))


def test_without_data_the_maximal_length_is_taken(llama, monkeypatch):
    def refuse(*_):
        raise InputError("There are no data.")

    monkeypatch.setattr(module, "_lengths", refuse)
    found = estimate(config(llama))
    assert found.batches["forget"] == Batch(2, 64, 128, 64)
    assert re.match("max_length, as .*There are no data", found.lengths)


def test_weights_are_never_read(llama):
    for file in llama.glob("*.safetensors"):
        save_file({"x": torch.zeros(1)}, file)
    assert estimate(config(llama)).parameters > 0


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("method", ["NPO", "GradDiff"])
def test_what_is_called_small_is_more_than_what_is_needed(llama, method):
    wanted = config(llama, trainer=method, args={"gradient_checkpointing": False})
    found = estimate(wanted)
    architecture = AutoConfig.from_pretrained(llama)
    assert not found.checkpointing and found.total_bytes < bound(found.batches, architecture)
