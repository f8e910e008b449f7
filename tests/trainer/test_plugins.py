"""Plug-ins in a run, together and refused; what they do to a step is in test_composed_step.py."""

from itertools import combinations

import pytest
import torch
from by_hand import gap, learnt
from small_trainer import LAYOUTS
from tiny import rows, tokenizer
from trainer.test_trainer import lora_model, losses, parts_for, trainer_for
from transformers import TrainerCallback

from unlora.data.pairs import Parts
from unlora.errors import GuardError, InputError
from unlora.model.probe import Probe
from unlora.trainer import Guards, Plugins, UnlearningLoss, UnlearningTrainer, start_adapter
from unlora.trainer.plugins import BalDRO

NLL = {"retain_loss_type": "NLL"}


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


# --- layouts -------------------------------------------------------------------------------------

BY_A_TRAINER = ("LoRA+", "PDU")  # the others are in test_composed_step.py
BY_STEPS = [
    pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name not in BY_A_TRAINER
]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BY_A_TRAINER, *BY_STEPS])
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


@pytest.mark.slow
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
    _trainer, steps = trained_with(
        tmp_path, "NPO", {"LoRAPlus": {"ratio": 8.0}}, model=model, max_steps=1,
        learning_rate=1e-3, weight_decay=0.1,
    )  # fmt: skip
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    after = dict(model.named_parameters())
    for name, before, g in zip(names, steps.weights[0], steps.gradients[0], strict=True):
        rate = 8e-3 if "lora_B" in name else 1e-3
        torch.testing.assert_close(after[name].detach(), before - rate * (g + 0.1 * before))
    assert sum("lora_B" in name for name in names) == len(names) // 2


@pytest.mark.default_cases(1)
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


# every one of them twice, in the default run
COVERING = {("SAM", "GRU"), ("BalDRO", "LoRAPlus"), ("SAM", "FILA"), ("GRU", "ReGLU"),
            ("BalDRO", "ReGLU"), ("LoRAPlus", "FILA"), ("FILA", "ReGLU")}  # fmt: skip
PAIRS = [
    pytest.param(names, marks=() if names in COVERING else pytest.mark.slow)
    for names in combinations(SETTINGS, 2)
]


@pytest.mark.slow
@pytest.mark.default_cases(1)
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
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
    ({"SAM": {"rho": 0}}, "rho of plug-in SAM is 0; it must be above 0."),
    (
        {"GRU": {"moving_avg": 1.5}},
        "moving_avg of plug-in GRU is 1.5; it must be above 0 and 1 or less.",
    ),
    (
        {"GRU": {"moving_avg": 0}},
        "moving_avg of plug-in GRU is 0; it must be above 0 and 1 or less.",
    ),
    ({"BalDRO": {"variant": "KL"}}, "Unknown variant of plug-in BalDRO 'KL'. Known: DV, G."),
    ({"BalDRO": {"beta": 0.0}}, "beta of plug-in BalDRO is 0.0; it must be above 0."),
    (
        {"BalDRO": {"share": 1.1}},
        "share of plug-in BalDRO is 1.1; it must be above 0 and 1 or less",
    ),
    ({"LoRAPlus": {"ratio": -1}}, "ratio of plug-in LoRAPlus is -1; it must be above 0."),
    ({"FILA": {"num_rows": 0}}, "num_rows of plug-in FILA is 0; it must be 1 or more."),
    ({"FILA": {"num_rows": 2.5}}, "num_rows of plug-in FILA is 2.5; it must be a whole number."),
    ({"Orthogonal": {"weight": -1}}, "weight of plug-in Orthogonal is -1; it must be above 0."),
    ({"ReGLU": {"num_rows": -8}}, "num_rows of plug-in ReGLU is -8; it must be 1 or more."),
    ({"ReGLU": {"beta": 1.2}}, "beta of plug-in ReGLU is 1.2; it must be 0 or more and 1 or less."),
    ({"ReGLU": {"orthogonal_rank": -1}}, "orthogonal_rank of plug-in ReGLU is -1; it must be 0 or"),
    (
        {"ReGLU": {"orthogonal_weight": -1}},
        "orthogonal_weight of plug-in ReGLU is -1; it must be 0",
    ),
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
        ("Orthogonal", "NPO", NLL, False, "Set model.use_lora=true."),
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
