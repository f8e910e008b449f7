import json
import re
import shutil
from pathlib import Path
from types import MethodType

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from safetensors.torch import load_file
from small_step import Stepper, lora_model, parts_for
from small_trainer import LOSSES
from tiny import llama, rows, tokenizer
from transformers import TrainerCallback, TrainingArguments

from unlora.data.pairs import Parts
from unlora.errors import GuardError, InputError
from unlora.model.lineage import Lineage
from unlora.model.probe import Probe
from unlora.model.reference import as_reference
from unlora.trainer import (
    Guards,
    Plugins,
    UnlearningLoss,
    UnlearningTrainer,
    start_adapter,
    training_arguments,
)


def trainer_for(
    folder, loss, model=None, *, panels=(), callbacks=(), parts=None, plugins=None, penalty=None,
    **args,
):  # fmt: skip
    defaults = {
        "learning_rate": 1e-2,
        "max_steps": 3,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return UnlearningTrainer(
        model=model or lora_model(),
        args=training_arguments(defaults | args, output_dir=str(folder)),
        loss=loss,
        parts=parts or parts_for(loss),
        panels=panels,
        plugins=plugins or Plugins(),
        penalty=penalty,
        processing_class=tokenizer(),
        callbacks=list(callbacks),
    )


def losses(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


BY_A_TRAINER = ("finetune",)  # the others are in test_term_losses.py
BY_STEPS = [
    pytest.param(name, marks=pytest.mark.slow) for name in LOSSES if name not in BY_A_TRAINER
]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BY_A_TRAINER, *BY_STEPS])
def test_batch_layout_changes_nothing(tmp_path, name):
    """Rows have unequal lengths: a mean of micro-batch means would differ."""
    handler, method_args = LOSSES[name]
    loss = UnlearningLoss.build(handler, **method_args)
    found = []
    for batch, accumulate in ((16, 1), (4, 4), (2, 8)):
        trainer = trainer_for(
            tmp_path,
            loss,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
        )
        start = Probe.take(trainer.model)
        trainer.train()
        assert start.difference(trainer.model)[0] > 1e-4, "nothing was learnt"
        found.append((losses(trainer), dict(trainer.model.named_parameters())))
    (first_losses, first_weights), *others = found
    for other_losses, weights in others:
        # float32 sums in another order; terms of size 10 that nearly cancel
        assert other_losses == pytest.approx(first_losses, rel=1e-5, abs=1e-5)
        for key, weight in first_weights.items():
            torch.testing.assert_close(weights[key], weight, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.slow
def test_a_last_batch_that_is_not_full_is_a_mean_of_its_own_rows(tmp_path):
    loss = UnlearningLoss.build("GradAscent")
    parts = Parts({"forget": rows([3, 9, 1, 5, 2])}, "forget")
    found = []
    for batch, accumulate in ((4, 1), (2, 2), (1, 4)):
        trainer = trainer_for(
            tmp_path,
            loss,
            parts=parts,
            max_steps=4,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
        )
        trainer.train()
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.slow
def test_the_terms_are_logged_and_add_up(tmp_path):
    loss = UnlearningLoss.build("NPO", retain_loss_type="NLL", gamma=0.5, alpha=2.0)
    trainer = trainer_for(tmp_path, loss, per_device_train_batch_size=4)
    trainer.train()
    for total, forget, retain in zip(
        losses(trainer),
        losses(trainer, "forget_loss"),
        losses(trainer, "retain_loss"),
        strict=True,
    ):
        assert total == pytest.approx(0.5 * forget + 2.0 * retain, rel=1e-4)


@pytest.mark.slow
def test_the_terms_in_the_log_are_those_of_all_processes(tmp_path, monkeypatch):
    """Another process has seen the same numbers of rows, with a forget_loss of 1 on each."""
    noted = []

    def of_two(objects):
        noted.append(objects[0])
        return [*objects, {name: [1.0] * len(seen) for name, seen in objects[0].items()}]

    monkeypatch.setattr("unlora.trainer.running_means.gather_object", of_two)
    trainer = trainer_for(tmp_path, UnlearningLoss.build("NPO"), gradient_accumulation_steps=2)
    trainer.train()
    own = [sum(one["forget_loss"]) / 2 for one in noted]
    assert len(own) == 3 and all(len(one["forget_loss"]) == 2 for one in noted)
    assert losses(trainer, "forget_loss") == pytest.approx([(value + 1) / 2 for value in own])


def test_of_several_processes_only_the_first_writes_an_adapter(tmp_path, monkeypatch):
    """The others are asked to as well, and may hold no whole weights."""
    trainer = trainer_for(tmp_path, UnlearningLoss.build("NPO"))
    with monkeypatch.context() as patch:
        patch.setattr(TrainingArguments, "should_save", property(lambda self: False))
        trainer._save(str(tmp_path / "second"), None)
    assert not (tmp_path / "second").exists()
    trainer._save(str(tmp_path / "first"), None)
    assert (tmp_path / "first" / "adapter_model.safetensors").is_file()


def test_one_step_asks_each_pass_once(tmp_path):
    loss = UnlearningLoss.build("UNDIAL", retain_loss_type="KL")
    assert list(loss.views) == [
        "policy_forget", "policy_retain", "reference_forget", "reference_retain"
    ]  # fmt: skip
    trainer = trainer_for(tmp_path, loss, max_steps=1, per_device_train_batch_size=4)
    calls = []
    trainer.model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    # forget and retain rows in one pass, of the policy and of the reference
    assert len(calls) == 2


@pytest.mark.parametrize("weights", [{"alpha": 0.0}, {"gamma": 0.0}])
def test_a_term_of_weight_zero_costs_no_pass(weights):
    loss = UnlearningLoss.build("NPO", retain_loss_type="KL", **weights)
    part = "forget" if "alpha" in weights else "retain"
    assert list(loss.views) == [f"policy_{part}", f"reference_{part}"]


def test_the_reference_stays_while_the_policy_learns(tmp_path):
    trainer = trainer_for(tmp_path, UnlearningLoss.build("NPO"), learning_rate=0.1)
    before = Probe.take(trainer.model)
    trainer.train()
    assert before.difference(trainer.model)[0] > 1e-3
    with as_reference(trainer.model) as reference:
        assert before.difference(reference)[0] == 0


@pytest.mark.slow
def test_a_model_trained_in_full_gets_a_frozen_reference_only_if_asked_for(tmp_path):
    trainer = trainer_for(tmp_path, UnlearningLoss.build("GradAscent"), llama())
    assert trainer.context.losses.frozen is None
    trainer = trainer_for(tmp_path, UnlearningLoss.build("UNDIAL"), llama(), learning_rate=0.1)
    before = Probe.take(trainer.model)
    trainer.train()
    assert before.difference(trainer.model)[0] > 1e-3
    assert before.difference(trainer.context.losses.frozen)[0] == 0


def test_a_checkpoint_holds_the_adapter_only_and_resumes_exactly(tmp_path):
    loss = UnlearningLoss.build("NPO", retain_loss_type="NLL")
    settings = dict(
        optim="adamw_torch", max_steps=6, per_device_train_batch_size=4, save_strategy="steps",
        save_steps=3, lr_scheduler_type="linear",
    )  # fmt: skip
    whole = trainer_for(tmp_path / "whole", loss, lora_model(lora_dropout=0.1), **settings)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert not list(checkpoint.glob("model*.safetensors"))
    assert json.loads((checkpoint / "lineage.json").read_text())["links"][-1]["path"] == "."
    again = trainer_for(tmp_path / "again", loss, lora_model(lora_dropout=0.1), **settings)
    again.train(resume_from_checkpoint=str(checkpoint))
    for (name, p), q in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q), name


class Improving:
    """A panel whose metric gets better and then worse; it asks the model nothing."""

    def __init__(self, values):
        self.values = iter(values)

    def __call__(self, model):
        return {"mine": next(self.values)}


def improving(folder):
    return trainer_for(
        folder,
        UnlearningLoss.build("GradAscent"),
        panels=[Improving([0.5, 0.2, 0.9])],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_mine",
        greater_is_better=False,
    )


@pytest.mark.slow
def test_a_copied_run_has_its_own_best_checkpoint(tmp_path):
    improving(tmp_path / "one").train()
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    trainer = improving(tmp_path / "copy")
    trainer.train(resume_from_checkpoint=str(tmp_path / "copy" / "checkpoint-3"))
    assert trainer.state.best_model_checkpoint == str(tmp_path / "copy" / "checkpoint-2")


@pytest.mark.slow
def test_the_best_checkpoint_is_chosen_by_a_metric_of_the_panel(tmp_path):
    trainer = improving(tmp_path)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-2")
    saved = load_file(f"{best}/adapter_model.safetensors")
    now = dict(trainer.model.named_parameters())
    for name, tensor in saved.items():
        name = re.sub(r"(lora_[AB])", r"\1.default", name)
        assert torch.equal(now[name], tensor), "the best weights are back"


def test_an_evaluation_that_changes_the_model_stops_the_run(tmp_path):
    def careless(model):
        model.base_model.merge_adapter()
        return {}

    trainer = trainer_for(
        tmp_path, UnlearningLoss.build("GradAscent"), lora_model(init_lora_weights=False),
        panels=[careless],
    )  # fmt: skip
    with pytest.raises(GuardError, match="evaluation is pure: .* changed the weights"):
        trainer.evaluate()


def test_the_guards_report_what_they_saw(tmp_path):
    model = lora_model()
    model.target = Probe.take(model)
    guards = Guards()
    trainer_for(tmp_path, UnlearningLoss.build("GradAscent"), model, callbacks=[guards]).train()
    assert set(guards.findings) == {"start equals target", "gradients alive"}


def test_training_from_another_model_than_the_target_stops_before_the_first_step(tmp_path):
    model = lora_model()
    model.target = Probe.take(llama(seed=1))
    trainer = trainer_for(tmp_path, UnlearningLoss.build("GradAscent"), model, callbacks=[Guards()])
    with pytest.raises(GuardError, match="start equals target"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_gradient_checkpointing_reaches_every_adapter(tmp_path, reentrant):
    extra = {"gradient_checkpointing": True}
    if reentrant is not None:
        extra["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    guards = Guards()
    loss = UnlearningLoss.build("NPO", retain_loss_type="NLL")
    plain = trainer_for(tmp_path, loss)
    plain.train()
    trainer = trainer_for(tmp_path, loss, callbacks=[guards], **extra)
    trainer.train()
    assert "gradients alive" in guards.findings
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-5)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("wrong", ["missing", "frozen input"])
def test_an_adapter_without_gradient_stops_the_run(tmp_path, wrong):
    model = lora_model()
    loss = UnlearningLoss.build("GradAscent")
    if wrong == "missing":
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        layer.forward = layer.base_layer.forward  # an adapter that the network does not use
        trainer = trainer_for(tmp_path, loss, model, callbacks=[Guards()])
    else:
        trainer = trainer_for(tmp_path, loss, model, callbacks=[Guards()])
        optimizer = trainer.create_optimizer()
        optimizer.step = MethodType(lambda *_, **__: None, optimizer)  # nothing moves
    with pytest.raises(GuardError, match="gradients alive"):
        trainer.train()


@pytest.mark.slow
def test_warm_up_from_zero_is_not_mistaken_for_a_dead_adapter(tmp_path):
    guards = Guards()
    trainer = trainer_for(
        tmp_path, UnlearningLoss.build("GradAscent"), callbacks=[guards],
        lr_scheduler_type="linear", warmup_steps=2,
    )  # fmt: skip
    trainer.train()
    assert "gradients alive" in guards.findings


@pytest.mark.parametrize(
    "handler, method_args, message",
    [
        ("NPOO", {}, "Did you mean 'NPO'"),
        ("NPO", {"retain_loss_type": "NLLL"}, "Did you mean 'NLL'"),
        ("NPO", {"retain_loss_type": "SimNPO"}, "SimNPO is not a retain loss"),
        ("NLL", {}, "NLL is not a forget loss"),
        ("NPO", {"gamma": "much"}, "gamma is 'much'; it must be a number"),
        ("GradAscent", {"gamma": 0.0}, "nothing to minimise"),
        ("FinetuneTrainer", {"beta": 1.0}, "takes no method_args"),
    ],
)
def test_a_wrong_loss_is_refused_in_words(handler, method_args, message):
    with pytest.raises(InputError, match=message):
        UnlearningLoss.build(handler, **method_args)


def test_an_objective_on_alternates_alone_draws_them_with_their_questions(tmp_path):
    loss = UnlearningLoss.build("IdkNLL", retain_loss_type="NLL")
    assert list(loss.views) == ["policy_alternate", "policy_retain"]
    assert loss.parts == ("forget", "retain", "alternate")
    trainer = trainer_for(tmp_path, loss, per_device_train_batch_size=4)
    trainer.train()
    assert len(losses(trainer, "forget_loss")) == 3


def test_the_run_seed_or_the_data_seed_chooses_the_order_of_rows(tmp_path):
    loss = UnlearningLoss.build("GradAscent")

    def order(**seeds):
        return list(trainer_for(tmp_path, loss, **seeds)._get_train_sampler())

    assert order(seed=1) == order(seed=1) != order(seed=2)
    assert order(seed=1, data_seed=0) == order(seed=2, data_seed=0) == order(seed=0)


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path):
    trainer = trainer_for(tmp_path, UnlearningLoss.build("GradAscent"))
    next(p for p in trainer.model.parameters() if p.requires_grad).data.fill_(float("nan"))
    with pytest.raises(
        GuardError, match=r"divergence: (forget_loss is nan|the gradient is not finite) at step 1"
    ):
        trainer.train()


@pytest.mark.slow
def test_mixed_precision_does_not_look_like_another_model(tmp_path):
    model = lora_model(init_lora_weights=False)
    model.target = Probe.take(model)
    guards = Guards()
    trainer_for(
        tmp_path, UnlearningLoss.build("GradAscent"), model, callbacks=[guards], bf16=True
    ).train()
    assert "differ from the target's by 0.00e+00" in guards.findings["start equals target"]


# --- what a run remembers beside the weights -----------------------------------------------------

RETAIN = {"retain_loss_type": "NLL"}
REMEMBERED = {
    "RMU": ("RMU", {"layer": 0, "retain_loss_type": "EMBED_DIFF"}, {}),
    "AdaptiveRMU": ("AdaptiveRMU", {"layer": 0, "retain_loss_type": "NLL"}, {}),
    "PDU": ("PDU", RETAIN | {"dual_warmup_epochs": 1, "dual_step_size": 0.5}, {}),
    "BLADE": ("BLADE", RETAIN | {"inner_lr": 1e-2}, {}),
    "GRU": ("NPO", RETAIN, {"GRU": {}}),
}  # FILA and ReGLU: test_adapter_init.py


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("RMU", "BLADE") else ())
        for name in REMEMBERED
    ],
)
def test_what_a_step_depends_on_is_resumed_exactly(tmp_path, name):
    handler, method_args, given = REMEMBERED[name]
    settings = dict(
        optim="adamw_torch", max_steps=6, per_device_train_batch_size=2, save_strategy="steps",
        gradient_accumulation_steps=2, save_steps=3, lr_scheduler_type="linear",
    )  # fmt: skip

    def made(folder):
        loss = UnlearningLoss.build(handler, **method_args)
        plugins = Plugins.build(given, loss, use_lora=True)
        model = lora_model(lora_dropout=0.1)
        return trainer_for(tmp_path / folder, loss, model, plugins=plugins, **settings)

    whole = made("whole")
    whole.train()
    assert whole.context.state.state_dict(), "there is something"
    again = made("again")
    for tensor in again.context.state.drawn.values():
        tensor.zero_()
    if again.loss.constraint is not None:
        again.loss.constraint.multiplier = 77.0
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(again) == losses(whole), "the log goes on"
    for (key, p), q in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q), key
    left, right = whole.context.state.state_dict(), again.context.state.state_dict()
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        torch.testing.assert_close(right[key], tensor, rtol=0, atol=0, equal_nan=True, msg=key)


@pytest.mark.slow
def test_what_is_remembered_is_needed(tmp_path):
    """Without its file, a resumed run is another one."""
    loss = UnlearningLoss.build("NPO", **RETAIN)
    settings = dict(max_steps=3, save_strategy="steps", save_steps=2, learning_rate=1e-3)
    plugins = Plugins.build({"GRU": {"moving_avg": 0.3}}, loss, use_lora=True)
    trainer_for(tmp_path / "kept", loss, plugins=plugins, **settings).train()
    shutil.copytree(tmp_path / "kept", tmp_path / "lost")
    (tmp_path / "lost" / "checkpoint-2" / "objective.safetensors").unlink()
    averages = []
    for folder in ("kept", "lost"):
        again = trainer_for(tmp_path / folder, loss, plugins=plugins, **settings)
        again.train(resume_from_checkpoint=str(tmp_path / folder / "checkpoint-2"))
        averages.append(again.context.state.retain_average)
    assert any(not torch.allclose(a, b, rtol=1e-2) for a, b in zip(*averages, strict=True))


# --- hidden states: nothing above the layer ------------------------------------------------------


def at_a_layer(loss_name, retain="EMBED_DIFF", layer=0):
    return UnlearningLoss.build(loss_name, retain_loss_type=retain, layer=layer)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("handler", ["RMU", "AdaptiveRMU", "RMU_upstream"])
def test_what_is_above_the_layer_neither_runs_nor_learns(tmp_path, handler, full):
    model, guards = llama() if full else lora_model(init_lora_weights=False), Guards()
    model.lineage = Lineage("tiny")
    base = model if full else model.base_model.model
    calls = {0: 0, 1: 0}
    for number in calls:
        base.model.layers[number].register_forward_hook(
            lambda *_, number=number: calls.update({number: calls[number] + 1})
        )
    trainer = trainer_for(
        tmp_path, at_a_layer(handler), model, callbacks=[guards], learning_rate=0.1, max_steps=2
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    calls.update({0: 0, 1: 0})
    trainer.train()
    # of a model that is trained in full the reference is a copy, whose hooks are copied as well
    assert calls[0] >= 4 and calls[1] == 0
    assert "every trainable tensor had a finite gradient" in guards.findings["gradients alive"]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    below = {
        name for name in before
        if (".layers.0." in name and (full or "lora_" in name)) or (full and "embed" in name)
    }  # fmt: skip
    assert moved == below and len(below) >= 6
    assert {name for name, p in model.named_parameters() if p.requires_grad} == below
    if not full:
        with as_reference(model) as reference:
            assert Probe.take(llama()).difference(reference)[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("handler, retain", [("NPO", "EMBED_DIFF"), ("RMU", "NLL"), ("RMU", "KL")])
def test_what_a_term_reaches_does_not_rest(tmp_path, handler, retain):
    model, guards = lora_model(init_lora_weights=False), Guards()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer_for(
        tmp_path, at_a_layer(handler, retain), model, callbacks=[guards], learning_rate=0.1
    ).train()
    assert "every trainable tensor had a finite gradient" in guards.findings["gradients alive"]
    now = dict(model.named_parameters())
    assert not any(torch.equal(now[name], p) for name, p in before.items())


@pytest.mark.parametrize("handler, retain", [("RMU", "EMBED_DIFF"), ("NPO", "EMBED_DIFF")])
@pytest.mark.parametrize("layer", [2, 7])
def test_a_layer_that_is_not_there_is_refused(tmp_path, handler, retain, layer):
    with pytest.raises(InputError, match=f"layer is {layer}, but the model has layers 0 to 1"):
        trainer_for(tmp_path, at_a_layer(handler, retain, layer))


# --- what a step costs ---------------------------------------------------------------------------

TRAINERS = sorted(
    file.stem for file in (Path(__file__).parents[2] / "configs" / "trainer").glob("*.yaml")
)

# passes of one step: one of the policy for all parts of the data, one of the reference where no
# cache answers; a pass for all positions has one part, and a constraint asks term by term
PASSES = dict.fromkeys(TRAINERS, 1) | {
    "AdaptiveRMU": 2, "BLADE": 2 + 3, "JensUn": 2, "KL": 2, "KL_upstream": 3, "PDU": 2,
    "PDU_upstream": 2, "RMU": 2, "RMU_upstream": 2, "UNDIAL": 2, "UNDIAL_upstream": 2,
}  # fmt: skip


class Passes(TrainerCallback):
    """How often each step asks for the embedding of a batch."""

    def __init__(self, model):
        self.by_step, self._now = [], 0
        model.get_input_embeddings().register_forward_hook(self._count)

    def _count(self, *_):
        self._now += 1

    def on_step_begin(self, args, state, control, **kwargs):
        self._now = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.by_step.append(self._now)


@pytest.fixture(scope="module")
def shipped():
    """The section ``trainer`` of every shipped trainer."""
    with initialize_config_module("unlora.configs", version_base=None):
        return compose(overrides=[f"+trainer@all.{name}={name}" for name in TRAINERS]).all


def test_every_trainer_that_is_counted_is_shipped():
    assert set(PASSES) == set(TRAINERS)


def settings_of(section):
    """The method and the plug-ins of a section, with the layer of a small model."""
    method_args = OmegaConf.to_container(section.method_args)
    if "layer" in method_args:
        method_args["layer"] = 0
    return method_args, OmegaConf.to_container(section).get("plugins", {})


def passes_of_a_step(section, plugins=None, layout=(8, 1)):
    """How often a step asks for the embedding of a batch."""
    method_args, own = settings_of(section)
    plugins = plugins or own
    loss = UnlearningLoss.build(section.handler, **method_args)
    model, parts, penalty = lora_model(), parts_for(loss), None
    start = Plugins.build(plugins, loss, use_lora=True).start
    if start is not None:
        penalty = start_adapter(model, start, parts, pad_id=0, batch_size=8, seed=0)
    steps = Stepper(
        section.handler, method_args, plugins, model=model, parts=parts, penalty=penalty,
        layout=layout,
    )  # fmt: skip
    calls = []
    model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    steps.run()
    return len(calls)


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("name", TRAINERS)
def test_a_step_costs_the_passes_that_the_terms_declare(shipped, name):
    assert passes_of_a_step(shipped[name]) == PASSES[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["UNDIAL", "BLADE"])
def test_a_step_of_a_trainer_costs_no_more(tmp_path, shipped, name):
    method_args, _ = settings_of(shipped[name])
    loss, model = UnlearningLoss.build(shipped[name].handler, **method_args), lora_model()
    counted = Passes(model)
    trainer_for(tmp_path, loss, model, max_steps=1, callbacks=[counted]).train()
    assert counted.by_step == [PASSES[name]]


@pytest.mark.default_cases(2)
@pytest.mark.parametrize(
    "name, given, passes",
    [
        ("NPO", {"LoRAPlus": {}}, 1),
        # the others ask for the gradient of each term by itself
        ("NPO", {"SAM": {}}, 2 + 1),
        ("NPO", {"BalDRO": {}}, 2 + 1),
        ("NPO", {"GRU": {}}, 2),
        ("NPO", {"SAM": {}, "GRU": {}, "BalDRO": {}}, 2 + 2),
        ("DPO", {"SAM": {}}, 2 + 1),
        ("UNDIAL", {"SAM": {}}, 2 + 2),
        ("PDU", {"BalDRO": {}}, PASSES["PDU"] + 1),
        ("BLADE", {"SAM": {}}, PASSES["BLADE"] + 1),
    ],
)
def test_plugins_cost_what_they_say(shipped, name, given, passes):
    assert passes_of_a_step(shipped[name], given, layout=(2, 2)) == 2 * passes
