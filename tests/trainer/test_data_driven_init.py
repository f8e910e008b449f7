"""Adapters that start from the weights: exact at the start, portable at the end."""

import json
from pathlib import Path

import pytest
import torch
from by_hand import added, gap
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import LORA, VOCABULARY, llama, rows, tokenizer
from trainer.test_plugins import Steps
from trainer.test_trainer import losses
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from unlora.data.collate import collate
from unlora.data.pairs import Parts
from unlora.errors import InputError
from unlora.model import get_model
from unlora.model.adapter_init import lora_layers, start_at
from unlora.model.lora import LoRAModelForCausalLM
from unlora.model.probe import Probe
from unlora.model.reference import POLICY, as_reference
from unlora.trainer import (
    Guards,
    Plugins,
    UnlearningLoss,
    UnlearningTrainer,
    start_adapter,
    training_arguments,
)
from unlora.trainer.data_driven_init import contrast, fisher
from unlora.trainer.plugins import FILA, ReGLU

STARTS = {
    "FILA": ({}, {"FILA": {}}),
    "ReGLU": ({"use_rslora": True}, {"ReGLU": {"orthogonal_rank": 8}}),
    "pissa": ({"init_lora_weights": "pissa"}, {}),
    "olora": ({"init_lora_weights": "olora", "lora_alpha": 3, "use_rslora": True}, {}),
}
PARTS = Parts(
    {"forget": rows([3, 9, 1, 5, 2, 8]), "retain": rows([2, 7, 5, 1, 6, 4, 8], seed=1)}, "forget"
)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("root")
    tokenizer().save_pretrained("root")
    return "root"


def started(root, name):
    lora, plugins = STARTS[name]
    model = LoRAModelForCausalLM.from_pretrained(
        root, {**LORA, "lora_alpha": 6, **lora}, dtype=torch.float32
    )
    loss = UnlearningLoss.build("IHL", retain_loss_type="NLL")
    chosen = Plugins.build(plugins, loss, use_lora=True)
    penalty = None
    if chosen.start is not None:
        penalty = start_adapter(model, chosen.start, PARTS, pad_id=258, batch_size=3, seed=0)
    return model, loss, penalty


def trainer_of(model, loss, penalty, folder, *, plugins=None, callbacks=(), **args):
    settings = {
        "learning_rate": 3e-2, "max_steps": 4, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "per_device_train_batch_size": 4,
    }  # fmt: skip
    return UnlearningTrainer(
        model=model,
        args=training_arguments(settings | args, output_dir=str(folder)),
        loss=loss,
        penalty=penalty,
        plugins=plugins or Plugins(),
        parts=PARTS,
        processing_class=tokenizer(),
        callbacks=[Guards(), *callbacks],
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", STARTS)
def test_it_starts_at_the_target_and_ends_as_an_adapter_for_the_unchanged_root(root, name):
    model, loss, penalty = started(root, name)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    assert all(x.lora_B[POLICY].weight.any() for x in lora_layers(model).values())
    # W x + s B A x - s B A x in float32, with terms of size ten and s up to 3
    assert model.target.difference(model)[0] < 3e-5
    trainer_of(model, loss, penalty, "run").train()
    assert model.target.difference(model)[0] > 0.1, "nothing was learnt"
    with as_reference(model) as reference:
        assert model.target.difference(reference)[0] == 0
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], weight) for n, weight in weights.items()), "the base changed"

    trainer_of(model, loss, penalty, "run").save_model()
    said = Probe.take(model)
    assert json.loads(Path("run/adapter_config.json").read_text())["r"] == 2 * LORA["r"]
    base = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, "run").eval()
    assert said.difference(plain)[0] < 1e-4
    section = {
        "model_args": {"pretrained_model_name_or_path": "run", "torch_dtype": "float32"},
        "use_lora": True,
        "lora_config": LORA,
    }
    assert said.difference(get_model(section)[0])[0] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FILA", "ReGLU"])
def test_a_run_resumes_exactly(root, name):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(*started(root, name), "whole", **settings)
    whole.train()
    again = trainer_of(*started(root, name), "again", **settings)
    again.train(resume_from_checkpoint="whole/checkpoint-2")
    for (key, p), q in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q), key


def test_filas_start_is_that_of_lokus_code(root):
    model = LoRAModelForCausalLM.from_pretrained(root, {**LORA, "lora_alpha": 6})
    layers = lora_layers(model)
    weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    batches = {
        part: [collate(PARTS.rows[part][i : i + 3], 258) for i in (0, 3)]
        for part in ("forget", "retain")
    }
    found = {part: fisher(model, batches[part], weights) for part in batches}
    start_adapter(model, FILA(num_rows=100), Parts(
        {part: PARTS.rows[part][:6] for part in batches}, "forget"
    ), pad_id=258, batch_size=6, seed=0)  # fmt: skip
    whole = {part: fisher(model, [collate(PARTS.rows[part][:6], 258)], weights) for part in batches}
    assert not torch.allclose(found["forget"]["lm_head"], whole["forget"]["lm_head"]), "by batch"
    scaling = 6 / 4
    for name, weight in before.items():
        # as in measure_importance.py and forget.py, but for the randomised svd
        ratio = whole["forget"][name] / (whole["retain"][name] + 1e-5)
        importance = ratio.sum(1).sqrt()
        u, s, v = torch.linalg.svd(importance[:, None] * weight, full_matrices=False)
        u, s, v = u[:, :4], s[:4] / scaling, v[:4].T
        a = (v * s.sqrt()).T
        b = u * s.sqrt() / (importance + 1e-5)[:, None]
        found_b, found_a = layers[name].lora_B[POLICY].weight, layers[name].lora_A[POLICY].weight
        sign = (found_a * a).sum(1).sign()  # singular vectors have none
        torch.testing.assert_close(found_a, a * sign[:, None], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found_b, b * sign, rtol=1e-3, atol=1e-3)
        assert torch.equal(weight, weights[name])


def test_the_fisher_information_is_the_square_of_each_batchs_gradient(root):
    model = LoRAModelForCausalLM.from_pretrained(root, LORA)
    weight = model.base_model.model.lm_head.base_layer.weight
    batches = [collate(rows([3, 2]), 258), collate(rows([6], seed=3), 258)]
    expected = 0
    for batch, share in zip(batches, (5 / 11, 6 / 11), strict=True):
        plain = llama()
        logits = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        flat = logits[:, :-1].reshape(-1, VOCABULARY)
        torch.nn.functional.cross_entropy(flat, batch["labels"][:, 1:].reshape(-1)).backward()
        expected = expected + share * plain.lm_head.weight.grad**2
    torch.testing.assert_close(
        fisher(model, batches, {"head": weight})["head"], expected, rtol=1e-3, atol=1e-9
    )
    assert not weight.requires_grad and weight.grad is None


def test_reglus_directions_are_the_eigenvectors_of_the_whole_matrix():
    generator = torch.Generator().manual_seed(0)
    forget = torch.randn(9, 30, generator=generator, dtype=torch.float64)
    retain = torch.randn(7, 30, generator=generator, dtype=torch.float64)
    found = contrast(forget, retain, 0.7, 4)
    matrix = 0.3 * forget.T @ forget / 9 - 0.7 * retain.T @ retain / 7
    _, vectors = torch.linalg.eigh(matrix)
    expected = vectors[:, -4:]
    torch.testing.assert_close(found @ found.T, expected @ expected.T)


def test_reglu_wants_more_directions_than_forget_data_have():
    """9 positive eigenvalues, 14 of 0, 7 negative ones; forget01 of TOFU has 40 rows."""
    generator = torch.Generator().manual_seed(0)
    forget = torch.randn(9, 30, generator=generator)
    retain = torch.randn(7, 30, generator=generator)
    matrix = (0.3 * forget.T @ forget / 9 - 0.7 * retain.T @ retain / 7).double()
    values, vectors = (x.flip(-1) for x in torch.linalg.eigh(matrix))
    assert values[8] > 1e-3 > values[9] > -1e-3 > values[23]
    found = contrast(forget, retain, 0.7, 25)
    torch.testing.assert_close(found.T @ found, torch.eye(25), rtol=0, atol=1e-5)
    for first, last in ((0, 9), (9, 23), (23, 25)):
        part, expected = found[:, first:last], vectors[:, first:last].float()
        torch.testing.assert_close(part @ part.T, expected @ expected.T, rtol=0, atol=1e-4)
    for rank in (4, 9, 15):
        fewer = contrast(forget, retain, 0.7, rank)
        assert torch.equal(fewer[:, :9], found[:, : min(rank, 9)]) and fewer.shape[1] == rank
    assert torch.equal(found, contrast(forget, retain, 0.7, 25)), "drawn in the same way each time"


def outputs_of(model, part):
    """What each layer under an adapter answers to the rows of a part, summed over their tokens."""
    found = {}
    for row in PARTS.rows[part]:
        handles = []
        for name, layer in lora_layers(model).items():

            def keep(_module, _args, output, name=name, row=row):
                # of the head, the scored tokens only
                scored = [t - 1 for t, label in enumerate(row.labels) if label != -100]
                said = output[0, scored] if name == "lm_head" else output[0]
                found.setdefault(name, []).append(said.detach().sum(0))

            handles.append(layer.get_base_layer().register_forward_hook(keep))
        with torch.no_grad():
            model(input_ids=torch.tensor([row.input_ids]))
        for handle in handles:
            handle.remove()
    return {name: torch.stack(sums) for name, sums in found.items()}


def test_reglus_start_is_that_of_the_paper(root):
    """A = Q^T W, B = Q, Q the leading eigenvectors of (1 - beta) Cov_forget - beta Cov_retain."""
    model = LoRAModelForCausalLM.from_pretrained(root, LORA)
    said = {part: outputs_of(model, part) for part in ("forget", "retain")}
    start_adapter(model, ReGLU(beta=0.3), PARTS, pad_id=258, batch_size=3, seed=0)
    for name, layer in lora_layers(model).items():
        forget, retain = (said[part][name].double() for part in ("forget", "retain"))
        matrix = 0.7 * forget.T @ forget / len(forget) - 0.3 * retain.T @ retain / len(retain)
        q = torch.linalg.eigh(matrix).eigenvectors[:, -LORA["r"] :].float()
        b, a = layer.lora_B[POLICY].weight, layer.lora_A[POLICY].weight
        torch.testing.assert_close(b @ b.T, q @ q.T, rtol=0, atol=2e-3)
        torch.testing.assert_close(a, b.T @ layer.get_base_layer().weight)
        assert (b.T @ b - torch.eye(LORA["r"])).abs().max() < 1e-5


def directions_of(model, rank):
    """P: the leading eigenvectors of Cov_retain."""
    return {
        name: torch.linalg.eigh((said.T @ said).double()).eigenvectors[:, -rank:].float()
        for name, said in outputs_of(model, "retain").items()
    }


@pytest.mark.slow
def test_reglus_penalty_is_that_of_the_paper(root):
    model = LoRAModelForCausalLM.from_pretrained(root, LORA)
    directions = directions_of(model, 3)
    plugin = ReGLU(orthogonal_rank=3, orthogonal_weight=0.5)
    penalty = start_adapter(model, plugin, PARTS, pad_id=258, batch_size=3, seed=0)
    layers = lora_layers(model)
    b = {name: layer.lora_B[POLICY].weight for name, layer in layers.items()}
    value = sum((b[name].T @ directions[name]).square().sum() for name in b)
    torch.testing.assert_close(penalty(model), 0.5 * value, rtol=1e-3, atol=1e-4)
    penalty(model).backward()
    for name, layer in layers.items():
        p = directions[name]
        expected = 0.5 * 2 * p @ p.T @ b[name]
        torch.testing.assert_close(b[name].grad, expected.detach(), rtol=1e-2, atol=1e-3)
        assert layer.lora_A[POLICY].weight.grad is None
    for nothing in ({"orthogonal_rank": 0}, {"orthogonal_weight": 0.0}):
        fresh = LoRAModelForCausalLM.from_pretrained(root, LORA)
        none = start_adapter(fresh, ReGLU(**nothing), PARTS, pad_id=258, batch_size=3, seed=0)
        assert none is None


@pytest.mark.slow
@pytest.mark.parametrize("given", [{}, {"GRU": {}, "SAM": {}}], ids=["plain", "composed"])
def test_the_penalty_is_part_of_every_step_once(root, given):
    """Over several micro-batches, in the gradient and in the loss that is logged."""
    found = []
    for with_penalty in (True, False):
        model = LoRAModelForCausalLM.from_pretrained(root, LORA)
        plugin = ReGLU(orthogonal_rank=3, orthogonal_weight=0.05)
        penalty = start_adapter(model, plugin, PARTS, pad_id=258, batch_size=3, seed=0)
        expected = penalty(model)
        b = [layer.lora_B[POLICY].weight for layer in lora_layers(model).values()]
        slopes = torch.autograd.grad(expected, b)
        loss = UnlearningLoss.build("IHL", retain_loss_type="NLL")
        steps = Steps()
        trainer = trainer_of(
            model, loss, penalty if with_penalty else None, "run", callbacks=[steps],
            plugins=Plugins.build(given, loss, use_lora=True), max_steps=1, logging_steps=1,
            per_device_train_batch_size=2, gradient_accumulation_steps=3, max_grad_norm=0.0,
        )  # fmt: skip
        trainer.train()
        found.append((losses(trainer)[0], steps.gradients[0]))
    (more, with_it), (less, without) = found
    assert more - less == pytest.approx(float(expected.detach()), rel=1e-3)
    difference = added(with_it, without, -1)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    of_b = [g for name, g in zip(names, difference, strict=True) if "lora_B" in name]
    assert gap(slopes, of_b) < 1e-3
    assert all(not g.any() for name, g in zip(names, difference, strict=True) if "lora_A" in name)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("plugin", [FILA(), ReGLU()])
def test_layers_that_are_stored_the_other_way_round(plugin):
    """GPT-2's weights are [in, out]; their start is that of their transposes."""
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": VOCABULARY}
    base = GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.3)).eval()
    targets = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    model = get_peft_model(base, LoraConfig(**targets, r=3, task_type="CAUSAL_LM"))
    before = Probe.take(model)
    layers = lora_layers(model)
    weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    batches = {
        part: [collate([row], 258) for row in PARTS.rows[part]] for part in ("forget", "retain")
    }
    about = {part: fisher(model, batches[part], weights) for part in batches}
    start_adapter(model, plugin, PARTS, pad_id=258, batch_size=1, seed=0)
    assert before.difference(model)[0] < 1e-4
    if isinstance(plugin, FILA):
        assert any(weight.shape[0] == weight.shape[1] for weight in weights.values())
        for name, layer in layers.items():
            ratio = about["forget"][name].T / (about["retain"][name].T + 1e-5)
            importance = ratio.sum(1).sqrt()[:, None]
            product = layer.lora_B[POLICY].weight @ layer.lora_A[POLICY].weight
            u, s, v = torch.linalg.svd(importance * weights[name].T, full_matrices=False)
            expected = (u[:, :3] * s[:3]) @ v[:3] / (importance + 1e-5)
            torch.testing.assert_close(
                layer.scaling[POLICY] * product, expected, rtol=1e-3, atol=1e-3
            )


@pytest.mark.default_cases(2)
@pytest.mark.parametrize(
    "lora, said",
    [
        ({"use_dora": True}, "leave out use_dora"),
        ({"rank_pattern": {"q_proj": 2}}, "plain LoRA of one rank"),
        ({"r": 64}, "r is 64, but .* no more than 32 directions"),
    ],
)
def test_what_cannot_start_from_the_weights_is_refused(root, lora, said):
    with pytest.raises(InputError, match=said):
        LoRAModelForCausalLM.from_pretrained(
            root, {**LORA, "init_lora_weights": "pissa", **lora}, dtype=torch.float32
        )


def test_an_adapter_starts_once(root):
    model, *_ = started(root, "pissa")
    with pytest.raises(InputError, match="starts from the weights already. Choose one start"):
        start_at(model, lambda *_: None)


@pytest.mark.slow
@pytest.mark.parametrize("plugin", [FILA(), ReGLU()])
@pytest.mark.parametrize("mode", ["stack", "continue"])
def test_a_plugin_starts_an_adapter_only_where_no_other_is(root, plugin, mode):
    model, loss, penalty = started(root, "pissa")
    trainer_of(model, loss, penalty, "run", max_steps=1).train()
    trainer_of(model, loss, penalty, "run").save_model()
    second = LoRAModelForCausalLM.from_pretrained("run", LORA, lineage=mode)
    before = Probe.take(second)
    with pytest.raises(InputError, match="no other adapter is on them. Set model.lineage=merge."):
        start_adapter(second, plugin, PARTS, pad_id=258, batch_size=3, seed=0)
    assert before.difference(second)[0] == 0
    start_adapter(
        LoRAModelForCausalLM.from_pretrained("run", LORA, lineage="merge"),
        plugin, PARTS, pad_id=258, batch_size=3, seed=0,
    )  # fmt: skip


def test_the_start_is_exact_in_training_too(root):
    dropped = {**LORA, "init_lora_weights": "pissa", "lora_dropout": 0.5}
    model = LoRAModelForCausalLM.from_pretrained(root, dropped, dtype=torch.float32)
    ids = torch.arange(1, 20)[None]
    said = model.eval()(input_ids=ids).logits
    torch.testing.assert_close(model.train()(input_ids=ids).logits, said, rtol=0, atol=1e-4)
