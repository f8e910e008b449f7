"""Task vectors, turned round when training is over."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from recipes.test_train import TRAINING, config, weights
from small_step import Stepper, lora_model
from tiny import LORA, VOCABULARY, llama, rows, tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from unlora.data.collate import collate
from unlora.data.pairs import Parts
from unlora.errors import InputError
from unlora.model import get_model
from unlora.model.adapter_init import lora_layers
from unlora.model.lora import LoRAModelForCausalLM
from unlora.model.reference import POLICY
from unlora.objectives import TERMS
from unlora.recipes import train
from unlora.trainer import TaskVector, UnlearningLoss
from unlora.trainer.data_driven_init import fisher

PARTS = Parts({"forget": rows([3, 5, 2, 4]), "retain": rows([4, 2, 6], seed=1)}, "forget")


def learn(model, handler, **method_args):
    steps = Stepper(
        handler, method_args, model=model, parts=PARTS, layout=(8, 1), learning_rate=0.3
    )
    steps.run(3)


def learnt_and_subtracted(model, handler, **hyper):
    """The weights before, with the task vector, and after its subtraction; and what was said."""
    before = effective(model)
    loss = UnlearningLoss.build(handler, alpha=0.0, **hyper)
    vector = TaskVector(model, loss.forget)
    learn(model, handler, alpha=0.0, **hyper)
    learnt = effective(model)
    assert any((learnt[name] - before[name]).abs().max() > 1e-3 for name in before)
    said = vector.subtract(PARTS, pad_id=258, batch_size=2, seed=0)
    return before, learnt, effective(model), said


def effective(model):
    """Every weight with what an adapter adds to it."""
    if not hasattr(model, "peft_config"):
        return {name: p.detach().clone() for name, p in model.named_parameters()}
    found = {}
    for name, layer in lora_layers(model).items():
        product = layer.lora_B[POLICY].weight @ layer.lora_A[POLICY].weight
        weight = layer.get_base_layer().weight + layer.scaling[POLICY] * product
        found[name] = weight.detach().clone()
    return found


@pytest.mark.parametrize("make", [llama, lora_model])
def test_negation_is_the_target_minus_what_was_learnt(make):
    before, learnt, after, _ = learnt_and_subtracted(make(), "Negation", scale=0.7)
    for name, weight in before.items():
        expected = weight - 0.7 * (learnt[name] - weight)
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-5)


def test_negation_turns_one_factor_round_and_nothing_else():
    model = lora_model()
    loss = UnlearningLoss.build("Negation", scale=0.7)
    vector = TaskVector(model, loss.forget)
    learn(model, "Negation", scale=0.7)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    said = vector.subtract(PARTS, pad_id=258, batch_size=2, seed=0)
    assert said == "subtracted 0.7 of the task vector"
    for name, p in model.named_parameters():
        expected = -0.7 * before[name] if "lora_B" in name else before[name]
        assert torch.equal(p, expected), name


def shares(names):
    """F_forget / (F_forget + F_retain) at the target, from plain gradients of each batch."""
    found = []
    for part in ("forget", "retain"):
        taken = [PARTS.rows[part][i] for i in chosen(part)]
        batches = [collate(taken[i : i + 2], 258) for i in range(0, len(taken), 2)]
        tokens = [int((b["labels"] != -100).sum()) for b in batches]
        total = {name: 0 for name in names}
        for batch, count in zip(batches, tokens, strict=True):
            plain = llama()
            logits = plain(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
            gradients = {n: p.grad for n, p in plain.named_parameters()}
            for name in names:
                key = name if name in gradients else f"{name}.weight"
                total[name] = total[name] + count / sum(tokens) * gradients[key] ** 2
        found.append(total)
    forget, retain = found
    return {n: torch.nan_to_num(forget[n] / (forget[n] + retain[n])) for n in names}


def chosen(part):
    import numpy as np

    return np.random.default_rng(0).permutation(len(PARTS.rows[part]))


def test_perta_subtracts_every_weight_by_its_share():
    before, learnt, after, _ = learnt_and_subtracted(llama(), "PerTA", scale=2.0)
    share = shares(before)
    assert 0.2 < torch.cat([x.flatten() for x in share.values()]).mean() < 0.8
    for name, weight in before.items():
        expected = weight - 2 * share[name] * (learnt[name] - weight)
        # squares of gradients of 1e-4 in float32, and their ratio
        torch.testing.assert_close(after[name], expected, rtol=1e-2, atol=1e-4)


def test_perta_of_an_adapter_is_the_nearest_of_its_rank():
    before, learnt, after, said = learnt_and_subtracted(lora_model(), "PerTA")
    share, lost = shares(before), []
    for name, weight in before.items():
        wanted = -share[name] * (learnt[name] - weight)
        u, s, v = torch.linalg.svd(wanted, full_matrices=False)
        rank = LORA["r"]
        nearest = (u[:, :rank] * s[:rank]) @ v[:rank]
        torch.testing.assert_close(after[name] - weight, nearest, rtol=5e-2, atol=2e-3)
        lost.append(float(s[rank:].norm() / s.norm()))
    assert f"but for {sum(lost) / len(lost):.1%} of its norm" in said


def test_perta_of_layers_that_are_stored_the_other_way_round():
    """GPT-2's weights are [in, out]. Of full rank, an adapter holds all of it."""
    torch.manual_seed(0)
    shape = {"n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": VOCABULARY}
    base = GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.3)).eval()
    targets = {"target_modules": ["attn.c_attn", "attn.c_proj"], "fan_in_fan_out": True, "r": 8}
    model = get_peft_model(base, LoraConfig(**targets, task_type="CAUSAL_LM"))
    layers = lora_layers(model)
    weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    assert {tuple(weight.shape) for weight in weights.values()} == {(8, 24), (8, 8)}
    batches = {
        part: [collate([PARTS.rows[part][i]], 258) for i in chosen(part)] for part in PARTS.rows
    }
    about = {part: fisher(model, batches[part], weights) for part in batches}
    vector = TaskVector(model, TERMS["PerTA"])
    learnt = {}
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_B[POLICY].weight.normal_()
            product = layer.lora_B[POLICY].weight @ layer.lora_A[POLICY].weight
            learnt[name] = layer.scaling[POLICY] * product.T
    said = vector.subtract(PARTS, pad_id=258, batch_size=1, seed=0)
    assert "exact but for 0.0% of its norm" in said
    for name, layer in layers.items():
        share = about["forget"][name] / (about["forget"][name] + about["retain"][name])
        product = layer.lora_B[POLICY].weight @ layer.lora_A[POLICY].weight
        now = layer.scaling[POLICY] * product.T
        torch.testing.assert_close(now, -share * learnt[name], rtol=1e-3, atol=1e-4)


def test_what_is_learnt_must_be_told_from_what_was_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("root")
    tokenizer().save_pretrained("root")
    pissa = LoRAModelForCausalLM.from_pretrained("root", {**LORA, "init_lora_weights": "pissa"})
    with pytest.raises(InputError, match="Leave out model.lineage=continue"):
        TaskVector(pissa, TERMS["Negation"])


def test_shares_need_rows(tmp_path):
    with pytest.raises(InputError, match="num_rows of objective PerTA is 0; it must be 1 or more."):
        TaskVector(lora_model(), TERMS["PerTA"].configure(num_rows=0))


@pytest.mark.slow
@pytest.mark.parametrize(
    "handler, lora",
    [
        pytest.param("Negation", True, marks=pytest.mark.slow),
        ("PerTA", True),
        ("Negation", False),
        pytest.param("PerTA", False, marks=pytest.mark.slow),
    ],
)
def test_a_run_subtracts_what_it_has_learnt_and_says_so(tmp_path, monkeypatch, handler, lora):
    monkeypatch.chdir(tmp_path)
    root = llama(max_position_embeddings=512)
    root.save_pretrained("root")
    tokenizer().save_pretrained("root")
    learnt, usual = [], TaskVector.subtract

    def watched(self, *args, **kwargs):
        learnt.append(effective(self.model))
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(TaskVector, "subtract", watched)
    cfg = config(
        "unlearn", "unlearn/pocket/lora", weights("root"), "paths.output_dir=run",
        f"trainer={handler}", "trainer.method_args.scale=0.5", f"model.use_lora={lora}",
        *TRAINING, *(["trainer.method_args.num_rows=4"] if handler == "PerTA" else []),
    )  # fmt: skip
    cfg.eval = {}  # that takes most of the time
    train.run(cfg)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    said = "subtracted 0.5 of the task vector" + ", weight by weight" * (handler == "PerTA")
    assert manifest["arithmetic"].startswith(said)
    assert set(manifest["data"]) == ({"forget", "retain"} if handler == "PerTA" else {"forget"})
    section = {"model_args": {"pretrained_model_name_or_path": "run", "torch_dtype": "float32"}}
    saved, _ = get_model(section, trainable=False)
    merged = saved.merge_and_unload() if lora else saved
    before, now = (
        {name: p.detach() for name, p in model.named_parameters()} for model in (root, merged)
    )
    turned = 0
    for name, weight in learnt[0].items():
        name = name if name in now else f"{name}.weight"
        vector = weight - before[name]
        if handler == "Negation":
            expected = before[name] - 0.5 * vector
            torch.testing.assert_close(now[name], expected, rtol=1e-5, atol=1e-5)
        # PerTA's shares are between 0 and 1: every weight goes back on the other side
        turned += float(((now[name] - before[name]) * vector).sum())
    assert turned < -1e-4


@pytest.mark.parametrize("wrong", [{"alpha": 1.0, "retain_loss_type": "NLL"}, {"gamma": 0.0}])
def test_nothing_but_forget_data_is_learnt_to_be_subtracted(wrong):
    with pytest.raises(InputError, match="nothing to minimise|learns forget data alone"):
        UnlearningLoss.build("Negation", **{"alpha": 0.0, **wrong})


def test_dora_is_no_product_to_turn_round():
    model = get_peft_model(llama(), LoraConfig(**LORA, task_type="CAUSAL_LM", use_dora=True))
    with pytest.raises(InputError, match="Set model.lora_config.use_dora=false"):
        TaskVector(model, TERMS["Negation"])
