"""Each guard, after the failure it catches has been shown to happen."""

import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import LORA, llama

from unlora.errors import GuardError
from unlora.model.guards import (
    evaluation_is_pure,
    export_parity,
    gradient_faults,
    gradients_alive,
    start_equals_target,
)
from unlora.model.merge import merge_adapters
from unlora.model.probe import Probe


def adapted(*, tied: bool = False, **config) -> PeftModel:
    """A model whose adapter changes its answers."""
    torch.manual_seed(0)
    return get_peft_model(
        llama(tied=tied), LoraConfig(**{**LORA, "init_lora_weights": False, **config})
    )


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_start_equals_target_catches_an_adapter_that_was_wiped():
    base = Probe.take(llama())
    target = adapted()
    said = Probe.take(target)
    assert base.difference(target)[0] > 1, "the adapter must matter"
    # a second get_peft_model re-creates the adapter of the same name
    wiped = get_peft_model(target.base_model.model, LoraConfig(**LORA))
    assert base.difference(wiped)[0] == 0
    with pytest.raises(GuardError, match="Training would start from another"):
        start_equals_target(wiped, said)
    found = start_equals_target(adapted(), said)
    assert "differ" in found.words and found.difference == 0


def test_gradients_alive_catches_checkpointing_that_cuts_the_adapters_off():
    model = adapted(target_modules=["q_proj", "lm_head"], init_lora_weights=True).train()
    body = model.get_base_model().model.layers
    original = [layer.forward for layer in body]

    def reentrant(forward):
        # what re-entrant checkpointing does when no input requires a gradient: none comes back
        def cut(hidden, **kwargs):
            with torch.no_grad():
                return forward(hidden.detach(), **kwargs)

        return cut

    for layer, forward in zip(body, original, strict=True):
        layer.forward = reentrant(forward)
    model(input_ids=torch.arange(8)[None]).logits.square().mean().backward()
    alive = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert alive and all("lm_head" in name for name in alive), "only the head learns"
    with pytest.raises(GuardError, match="q_proj.*no gradient"):
        gradients_alive(gradient_faults(model), [])
    for layer, forward in zip(body, original, strict=True):
        layer.forward = forward
    model.zero_grad()
    model(input_ids=torch.arange(8)[None]).logits.square().mean().backward()
    assert gradients_alive(gradient_faults(model), [])


def test_gradients_alive_catches_a_gradient_that_is_not_finite():
    model = adapted().train()
    model(input_ids=torch.arange(8)[None]).logits.sum().backward()
    next(p for p in model.parameters() if p.grad is not None).grad[0, 0] = float("nan")
    with pytest.raises(GuardError, match="not finite"):
        gradients_alive(gradient_faults(model), [])


def test_evaluation_is_pure_catches_a_merge_that_leaves_nothing_to_train():
    model = adapted().train()
    with pytest.raises(GuardError, match="changed .*requires_grad"):
        with evaluation_is_pure(model):
            model.merge_and_unload()
    assert not any("lora_" in name for name, _ in model.named_parameters()), "nothing to train"


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda m: m.eval(), "train/eval mode"),
        (lambda m: m.get_base_model().lm_head.base_layer.weight.data[0, :1].add_(1), "the weights"),
        (lambda m: torch.rand(1), "the random state"),
        (lambda m: np.random.rand(), "the random state"),
        (lambda m: random.random(), "the random state"),
        (lambda m: next(m.parameters()).requires_grad_(True), "requires_grad"),
    ],
)
def test_evaluation_is_pure_names_what_changed(change, named):
    model = adapted().train()
    np.random.rand()  # numpy fills its key anew only now and then: the position counts, too
    with pytest.raises(GuardError, match=named):
        with evaluation_is_pure(model):
            change(model)
    with evaluation_is_pure(model):
        model.generation_config.temperature = 1.0  # says nothing about the answers asked for here


def test_export_parity_catches_the_merge_of_a_head_tied_to_the_embedding():
    model = adapted(tied=True)
    said = Probe.take(model)
    wrong = adapted(tied=True).merge_and_unload()
    assert said.difference(wrong)[0] > 1, "peft's own merge changes the embedding too"
    with pytest.raises(GuardError, match="merged model differ from the adapter's"):
        export_parity(said, merged=wrong)
    assert "merged" in export_parity(said, merged=merge_adapters(model))


def test_a_probe_leaves_the_model_as_it_was():
    model = adapted().train()
    model.get_base_model().model.layers[0].eval()
    with evaluation_is_pure(model):
        Probe.take(model)
