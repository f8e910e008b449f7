"""What the plug-ins do to a step, against the papers' formulas computed with autograd alone."""

from itertools import combinations

import pytest
import torch
from tiny import rows, tokenizer
from trainer.test_trainer import LENGTHS, lora_model, losses, parts_for, trainer_for
from transformers import TrainerCallback

from unlora.data.pairs import Parts
from unlora.errors import GuardError, InputError
from unlora.model.guards import Probe
from unlora.trainer import Guards, Plugins, UnlearningLoss, UnlearningTrainer, start_adapter
from unlora.trainer.gradients import dot, ema, perturbed, project_out_conflict, robust_weights
from unlora.trainer.plugins import BalDRO

NLL = {"retain_loss_type": "NLL"}
WHOLE = {"per_device_train_batch_size": 16}  # all forget rows in one micro-batch


class Steps(TrainerCallback):
    """Keeps the gradient of every step and the weights it was made at."""

    def __init__(self):
        self.gradients, self.weights = [], []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        learnt = [p for p in model.parameters() if p.requires_grad]
        self.gradients.append([p.grad.clone() for p in learnt])
        self.weights.append([p.detach().clone() for p in learnt])


def trained_with(folder, handler, given, *, model=None, method_args=NLL, **args):
    """A trainer after its steps, and what they were made of."""
    loss = UnlearningLoss.build(handler, **method_args)
    plugins = Plugins.build(given, loss, use_lora=True)
    steps = Steps()
    model = model or lora_model(init_lora_weights=False)
    trainer = trainer_for(folder, loss, model, plugins=plugins, callbacks=[steps], **args)
    trainer.train()
    return trainer, steps


# --- the losses and gradients again, in plain words ----------------------------------------------


def batches_of(trainer, epoch=0):
    """The micro-batches of an epoch, as the trainer has them."""
    loader = trainer.get_train_dataloader()
    loader.set_epoch(epoch)
    return list(loader)


def sums_and_lengths(model, batch):
    """log p(answer) and number of answer tokens of each row."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logps = model(**inputs).logits[:, :-1].float().log_softmax(-1)
    labels = batch["labels"][:, 1:]
    scored = labels != -100
    picked = logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (picked * scored).sum(1), scored.sum(1)


def mean_logp(model, batch):
    """Of the tokens, as GradDiff ascends."""
    sums, lengths = sums_and_lengths(model, batch)
    return sums.sum() / lengths.sum()


def row_logps(model, batch):
    """The mean of each row: what a loss with one value per token is for a row."""
    sums, lengths = sums_and_lengths(model, batch)
    return sums / lengths


def npo_rows(model, batch, beta=0.1):
    policy, _ = sums_and_lengths(model, batch)
    with torch.no_grad(), model.disable_adapter():
        reference, _ = sums_and_lengths(model, batch)
    return 2 / beta * (1 + (policy - reference).mul(beta).exp()).log()


def learnt(model):
    return [p for p in model.parameters() if p.requires_grad]


def slope(value, model):
    return list(torch.autograd.grad(value, learnt(model)))


def put(model, weights):
    with torch.no_grad():
        for p, weight in zip(learnt(model), weights, strict=True):
            p.copy_(weight)


def length(gradient):
    return torch.cat([g.detach().flatten() for g in gradient]).norm()


def added(one, other, share=1.0):
    return [a + share * b for a, b in zip(one, other, strict=True)]


def gap(one, other):
    """How far two gradients are apart, relative to the first."""
    return float(length(added(one, other, -1)) / length(one))


CLOSE = 1e-4  # float32 adds in another order; what is to be told apart differs by more than 1e-2


# --- SAM -----------------------------------------------------------------------------------------


def by_row(model, batch):
    return npo_rows(model, batch).mean()


@pytest.mark.parametrize("handler, forget", [("GradDiff", mean_logp), ("NPO", by_row)])
@pytest.mark.parametrize("layout", [(16, 1), (4, 4)])
def test_sam_takes_the_forget_gradient_where_it_is_worst_nearby(tmp_path, handler, forget, layout):
    trainer, steps = trained_with(
        tmp_path, handler, {"SAM": {"rho": 0.3}}, max_steps=1,
        method_args=NLL | {"gamma": 0.5, "alpha": 2.0},
        per_device_train_batch_size=layout[0], gradient_accumulation_steps=layout[1],
    )  # fmt: skip
    model = trainer.model
    put(model, steps.weights[0])
    (batch,) = batches_of(trainer_for(tmp_path, trainer.loss, model, **WHOLE))
    there = slope(forget(model, batch["forget"]), model)
    retain = slope(-mean_logp(model, batch["retain"]), model)
    put(model, added(steps.weights[0], there, 0.3 / length(there)))
    moved = slope(forget(model, batch["forget"]), model)
    assert gap(moved, there) > 1e-2
    halved, doubled = [0.5 * g for g in moved], [2.0 * g for g in retain]
    assert gap(added(halved, doubled), steps.gradients[0]) < CLOSE


def test_sam_gives_the_weights_back_bit_by_bit(tmp_path):
    model = lora_model(init_lora_weights=False)
    before = [p.detach().clone() for p in learnt(model)]
    _, steps = trained_with(tmp_path, "NPO", {"SAM": {"rho": 3.0}}, model=model, max_steps=1)
    assert all(map(torch.equal, before, steps.weights[0]))
    drawn = [torch.randn_like(p) for p in before]
    with pytest.raises(KeyboardInterrupt), perturbed(before, drawn, 0.7):
        kept = [p.clone() for p in before]
        raise KeyboardInterrupt
    assert float(length(added(steps.weights[0], kept, -1))) == pytest.approx(0.7, rel=1e-5)
    assert all(map(torch.equal, before, steps.weights[0])), "also where the pass fails"


# --- GRU -----------------------------------------------------------------------------------------


def test_gru_projects_against_a_moving_average_of_the_retain_gradient(tmp_path):
    # some rows are in both parts, so ascent and descent are at odds
    data = {"forget": rows(LENGTHS["forget"]), "retain": rows(LENGTHS["forget"][:10])}
    trainer, steps = trained_with(
        tmp_path, "GradDiff", {"GRU": {"moving_avg": 0.6}}, method_args=NLL | {"alpha": 0.25},
        parts=Parts(data, "forget"), learning_rate=1e-3, max_steps=3,
    )  # fmt: skip
    model, average, against, turned = trainer.model, None, [], []
    batches = batches_of(trainer) + batches_of(trainer, epoch=1)
    for weights, batch, found in zip(steps.weights, batches, steps.gradients, strict=False):
        put(model, weights)
        forget = slope(mean_logp(model, batch["forget"]), model)
        retain = slope(-mean_logp(model, batch["retain"]), model)
        newest = [0.6 * g for g in retain]
        average = added(newest, average, 0.4) if average else newest
        flat, other = (torch.cat([g.flatten() for g in x]) for x in (forget, average))
        against.append(float(flat @ other))
        share = min(against[-1], 0.0) / float(other @ other)
        expected = added(added(forget, average, -share), retain, 0.25)
        assert gap(expected, found) < CLOSE
        assert gap(expected, added(forget, retain, 0.25)) > 1e-2, "it makes a difference"
        turned.append(gap(added(forget, average, -share), project_out_conflict(forget, retain)))
    assert max(against) < 0 and len(against) == 3
    assert turned[0] < CLOSE < 1e-3 < turned[1], "the average counts from step 2 on"


def test_gru_changes_nothing_where_the_gradients_agree(tmp_path):
    names = ("forget", "retain", "alternate")
    parts = Parts({part: rows(LENGTHS["forget"]) for part in names}, "forget")
    found = []
    for given in ({"GRU": {}}, {}):
        # both terms learn the same rows
        _, steps = trained_with(tmp_path, "IdkNLL", given, parts=parts, max_steps=2)
        found.append(steps)
    for one, other in zip(found[0].gradients, found[1].gradients, strict=True):
        assert gap(one, other) < CLOSE


def test_the_rectified_gradient_has_nothing_against_the_retain_gradient():
    retain = [torch.tensor([1.0, 0.0]), torch.tensor([2.0])]
    agreeing = [torch.tensor([2.0, 5.0]), torch.tensor([-1.0])]  # inner product 2 - 2 = 0
    assert project_out_conflict(agreeing, retain) is agreeing
    # <f, r> = -4 + 2 * -3 = -10, |r|^2 = 5, so f + 2 r
    forget = [torch.tensor([-4.0, 5.0]), torch.tensor([-3.0])]
    first, second = project_out_conflict(forget, retain)
    assert first.tolist() == [-2.0, 5.0] and second.tolist() == [1.0]
    assert float(dot([first, second], retain)) == 0.0


def test_the_average_starts_at_zero():
    once = ema(None, [torch.tensor([2.0])], 0.8)
    assert once[0].item() == pytest.approx(1.6)
    assert ema(once, [torch.tensor([-1.0])], 0.8)[0].item() == pytest.approx(-0.48)


# --- BalDRO --------------------------------------------------------------------------------------


def donsker_varadhan(losses, beta):
    return beta * (losses / beta).exp().mean().log()


@pytest.mark.parametrize("handler, rows_of", [("GradDiff", row_logps), ("NPO", npo_rows)])
@pytest.mark.parametrize("variant", ["DV", "G"])
@pytest.mark.parametrize("layout", [(16, 1), (2, 8)])
def test_baldro_weighs_the_rows_of_the_effective_batch(tmp_path, handler, rows_of, variant, layout):
    settings = {"variant": variant, "beta": 1.5, "share": 0.25}
    trainer, steps = trained_with(
        tmp_path, handler, {"BalDRO": settings}, max_steps=1,
        method_args=NLL | {"gamma": 0.5, "alpha": 2.0},
        per_device_train_batch_size=layout[0], gradient_accumulation_steps=layout[1],
    )  # fmt: skip
    model = trainer.model
    put(model, steps.weights[0])
    (batch,) = batches_of(trainer_for(tmp_path, trainer.loss, model, **WHOLE))

    def robust():
        losses = rows_of(model, batch["forget"])
        if variant == "DV":
            return 1.5 * (losses / 1.5).exp().mean().log()
        return losses.sort().values[-4:].mean()  # a quarter of 16 rows

    forget = slope(robust(), model)
    assert gap(forget, slope(rows_of(model, batch["forget"]).mean(), model)) > 1e-2
    retain = slope(-mean_logp(model, batch["retain"]), model)
    assert gap(added([0.5 * g for g in forget], retain, 2.0), steps.gradients[0]) < CLOSE


def test_the_weights_of_the_rows_are_those_of_the_formula():
    losses = torch.tensor([1.0, 3.0, 2.0, 0.0, 2.5])
    # d/dl of beta log mean exp(l / beta) is the softmax
    given = losses.clone().requires_grad_()
    (4.0 * (given / 4.0).exp().mean().log()).backward()
    weights = robust_weights(losses, BalDRO("DV", beta=4.0))
    torch.testing.assert_close(weights, given.grad)
    assert robust_weights(losses, BalDRO("G", share=0.4)).tolist() == [0, 0.5, 0, 0, 0.5]
    assert robust_weights(losses, BalDRO("G", share=0.01)).tolist() == [0, 1, 0, 0, 0]
    torch.testing.assert_close(robust_weights(losses, BalDRO("G", share=1)), torch.full((5,), 0.2))
    # a softmax of summed log-likelihoods must not overflow
    assert robust_weights(torch.tensor([4000.0, 3999.0]), BalDRO(beta=1.0)).sum() == 1


def test_a_row_whose_tokens_are_all_left_out_has_no_say(tmp_path):
    """CEU leaves out the first token, and the only one of some rows."""
    parts = Parts({"forget": rows([1, 4, 1, 3, 1, 5])}, "forget")
    less = Parts({"forget": [row for row in parts.rows["forget"] if len(row.labels) > 5]}, "forget")
    found = []
    for data in (parts, less):
        _, steps = trained_with(
            tmp_path, "CEU", {"BalDRO": {"variant": "DV", "beta": 4.0}}, parts=data,
            method_args={"ignore_first_n_answer_tokens": 1}, max_steps=1, **WHOLE,
        )  # fmt: skip
        found.append(steps.gradients[0])
    assert gap(*found) < CLOSE


# --- layouts -------------------------------------------------------------------------------------

SKIPS = {"ignore_first_n_answer_tokens": 1, "gamma": 100.0}  # its gradient is small
LAYOUTS = {
    "SAM": ("NPO", {"SAM": {"rho": 0.3}}, NLL),
    "SAM by token": ("GradDiff", {"SAM": {"rho": 0.3}}, NLL),
    "GRU": ("GradDiff", {"GRU": {}}, NLL),
    "BalDRO": ("NPO", {"BalDRO": {}}, NLL),
    "BalDRO by token": ("GradDiff", {"BalDRO": {}}, NLL),
    "BalDRO with skips": ("CEU", {"BalDRO": {}}, SKIPS),
    "BalDRO G": ("SimNPO", {"BalDRO": {"variant": "G"}}, NLL),
    "LoRA+": ("NPO", {"LoRAPlus": {"ratio": 4.0}}, NLL),
    "all three": ("UNDIAL", {"SAM": {"rho": 0.3}, "GRU": {}, "BalDRO": {}}, NLL),
    "PDU": ("PDU", {}, NLL | {"dual_warmup_epochs": 0.0, "dual_step_size": 0.5}),
    "BLADE": ("BLADE", {}, NLL | {"inner_lr": 0.01}),
    "BLADE and all three": ("BLADE", {"SAM": {}, "GRU": {}, "BalDRO": {}}, NLL),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_batch_layout_changes_nothing(tmp_path, name):
    """Rows have unequal lengths: a mean of micro-batch means would differ."""
    handler, given, method_args = LAYOUTS[name]
    found = []
    for batch, accumulate in ((16, 1), (4, 4), (2, 8)):
        trainer, steps = trained_with(
            tmp_path, handler, given, method_args=method_args, max_steps=2, learning_rate=1e-3,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        )  # fmt: skip
        assert gap(steps.weights[0], learnt(trainer.model)) > 1e-5, "nothing was learnt"
        found.append((losses(trainer), learnt(trainer.model)))
    (first_losses, first_weights), *others = found
    for other_losses, weights in others:
        assert other_losses == pytest.approx(first_losses, rel=1e-5, abs=1e-5)
        for weight, other in zip(first_weights, weights, strict=True):
            torch.testing.assert_close(other, weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("handler", ["GradDiff", "BLADE"])
def test_a_last_batch_that_is_not_full_changes_nothing_either(tmp_path, handler):
    parts = Parts({"forget": rows([3, 9, 1, 5, 2]), "retain": rows([2, 7, 5, 1, 6, 4])}, "forget")
    found = []
    for batch, accumulate in ((4, 1), (2, 2), (1, 4)):
        trainer, _ = trained_with(
            tmp_path, handler, {"BalDRO": {}}, parts=parts, max_steps=4, learning_rate=1e-3,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        )  # fmt: skip
        found.append(losses(trainer))
    # a sum of two terms of size 10 that nearly cancel
    assert found[1] == pytest.approx(found[0], rel=1e-5, abs=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5, abs=1e-5)


# --- LoRA+ ---------------------------------------------------------------------------------------


def test_lora_plus_gives_lora_b_a_higher_learning_rate(tmp_path):
    model = lora_model(init_lora_weights=False)
    trainer, steps = trained_with(
        tmp_path, "NPO", {"LoRAPlus": {"ratio": 8.0}}, model=model, max_steps=1,
        learning_rate=1e-3, weight_decay=0.1,
    )  # fmt: skip
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    after = dict(model.named_parameters())
    for name, before, g in zip(names, steps.weights[0], steps.gradients[0], strict=True):
        rate = 8e-3 if "lora_B" in name else 1e-3
        torch.testing.assert_close(after[name].detach(), before - rate * (g + 0.1 * before))
    assert sum("lora_B" in name for name in names) == len(names) // 2


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_lora_plus_takes_the_optimizer_and_its_settings_from_the_config(tmp_path, optim):
    trainer, _ = trained_with(
        tmp_path, "NPO", {"LoRAPlus": {"ratio": 8.0}}, optim=optim, max_steps=1, adam_beta2=0.9,
        learning_rate=1e-3, weight_decay=0.1,
    )  # fmt: skip
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer).__name__ == {"sgd": "SGD", "adamw_torch": "AdamW"}[optim]
    groups = [group for group in optimizer.param_groups if group["params"]]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.1), (8e-3, 0.1)]
    if optim == "adamw_torch":
        assert {group["betas"][1] for group in groups} == {0.9}


# --- together, and refused -----------------------------------------------------------------------

SETTINGS = {
    "SAM": {}, "GRU": {}, "BalDRO": {}, "LoRAPlus": {"ratio": 2.0},
    "FILA": {"num_rows": 8}, "ReGLU": {"num_rows": 8, "orthogonal_rank": 2},
}  # fmt: skip


@pytest.mark.parametrize("names", combinations(SETTINGS, 2), ids="-".join)
def test_any_two_go_together_but_two_starts(tmp_path, names):
    loss = UnlearningLoss.build("NPO", **NLL)
    given = {name: SETTINGS[name] for name in names}
    if names == ("FILA", "ReGLU"):
        with pytest.raises(InputError, match="FILA and ReGLU both say where the adapter starts"):
            Plugins.build(given, loss, use_lora=True)
        return
    plugins = Plugins.build(given, loss, use_lora=True)
    model, parts, penalty = lora_model(), parts_for(loss), None
    before = Probe.take(model)
    if plugins.start is not None:
        penalty = start_adapter(model, plugins.start, parts, pad_id=0, batch_size=4, seed=0)
    assert before.difference(model)[0] < 1e-4
    guards = Guards()
    trainer_for(
        tmp_path, loss, model, parts=parts, plugins=plugins, penalty=penalty, callbacks=[guards]
    ).train()
    assert guards.findings["gradients alive"].startswith("every trainable tensor")
    assert before.difference(model)[0] > 1e-3


def test_an_adapter_without_gradient_stops_a_composed_step_too(tmp_path):
    model = lora_model()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.forward = layer.base_layer.forward  # an adapter that the network does not use
    trainer = trainer_for(
        tmp_path, UnlearningLoss.build("NPO", **NLL), model, plugins=Plugins(dro=BalDRO()),
        callbacks=[Guards()],
    )  # fmt: skip
    with pytest.raises(GuardError, match="q_proj.lora_A.default.weight: no gradient"):
        trainer.train()


REFUSED = [
    ({"SAMM": {}}, "Unknown plug-in 'SAMM'. Did you mean 'SAM'?"),
    ({"SAM": {"roh": 0.1}}, "Unknown parameter of plug-in SAM 'roh'. Did you mean 'rho'?"),
    ({"SAM": {"rho": "far"}}, "rho of plug-in SAM is 'far'; it must be a number."),
    ({"SAM": {"rho": 0}}, "The plug-in SAM has rho 0; it must be above 0."),
    ({"GRU": {"moving_avg": 1.5}}, "moving_avg 1.5; it must be above 0 and up to 1."),
    ({"GRU": {"moving_avg": 0}}, "moving_avg 0; it must be above 0 and up to 1."),
    ({"BalDRO": {"variant": "KL"}}, "has variant 'KL'; it must be DV or G."),
    ({"BalDRO": {"beta": 0.0}}, "needs a beta above 0 and a share above 0 and up to 1."),
    ({"BalDRO": {"share": 1.1}}, "needs a beta above 0 and a share above 0 and up to 1."),
    ({"LoRAPlus": {"ratio": -1}}, "has ratio -1; it must be above 0."),
    ({"FILA": {"num_rows": 0}}, "The plug-in FILA has num_rows 0; it must be 1 or more."),
    ({"FILA": {"num_rows": 2.5}}, "num_rows of plug-in FILA is 2.5; it must be a whole number."),
    ({"ReGLU": {"num_rows": -8}}, "The plug-in ReGLU has num_rows -8; it must be 1 or more."),
    ({"ReGLU": {"beta": 1.2}}, "has beta 1.2; it must be between 0 and 1."),
    ({"ReGLU": {"orthogonal_rank": -1}}, "orthogonal_rank and orthogonal_weight of 0 or more."),
    ({"ReGLU": {"orthogonal_weight": -1}}, "orthogonal_rank and orthogonal_weight of 0 or more."),
]


@pytest.mark.parametrize("given, said", REFUSED)
def test_wrong_names_and_settings_are_refused_in_words(given, said):
    with pytest.raises(InputError) as error:
        Plugins.build(given, UnlearningLoss.build("NPO", **NLL), use_lora=True)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "plugin, handler, method_args, use_lora, said",
    [
        ("LoRAPlus", "NPO", NLL, False, "Set model.use_lora=true."),
        ("FILA", "NPO", NLL, False, "Set model.use_lora=true."),
        ("ReGLU", "NPO", NLL, False, "Set model.use_lora=true."),
        ("SAM", "FinetuneTrainer", {}, True, "Use it to unlearn."),
        ("BalDRO", "FinetuneTrainer", {}, True, "Use it to unlearn."),
        ("FILA", "FinetuneTrainer", {}, True, "Use it to unlearn."),
        ("GRU", "NPO", {}, True, "retain_loss_type=NLL and an alpha above 0."),
        ("GRU", "NPO", NLL | {"alpha": 0.0}, True, "retain_loss_type=NLL and an alpha above 0."),
        ("BalDRO", "UNDIAL_upstream", NLL, True, "Choose the variant without _upstream."),
        ("FILA", "Negation", {}, True, "Leave one of them out."),
        ("ReGLU", "PerTA", {}, True, "Leave one of them out."),
    ],
)
def test_a_plugin_with_nothing_to_do_is_refused(plugin, handler, method_args, use_lora, said):
    loss = UnlearningLoss.build(handler, **method_args)
    with pytest.raises(InputError) as error:
        Plugins.build({plugin: {}}, loss, use_lora=use_lora)
    assert str(error.value).startswith(f"The plug-in {plugin} ") and said in str(error.value)
    assert "\n" not in str(error.value)


def test_lora_plus_goes_with_finetuning():
    loss = UnlearningLoss.build("FinetuneTrainer")
    assert Plugins.build({"LoRAPlus": None}, loss, use_lora=True).lora_plus.ratio == 16.0


def test_half_precision_gradients_are_refused_where_they_are_composed(tmp_path):
    loss = UnlearningLoss.build("NPO", **NLL)
    trainer = trainer_for(tmp_path, loss)  # goes
    trainer.args.fp16 = True
    with pytest.raises(InputError, match="set trainer.args.bf16 in place of fp16"):
        UnlearningTrainer(
            model=lora_model(), args=trainer.args, loss=loss, parts=parts_for(loss),
            plugins=Plugins(dro=BalDRO()), processing_class=tokenizer(),
        )  # fmt: skip
