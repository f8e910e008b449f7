"""An adapter that is kept out of what the adapters of earlier requests read."""

import json

import pytest
import torch
from plain_adapters import make_adapter, make_root
from safetensors.torch import load_file
from tiny import LORA

from unlora.errors import InputError
from unlora.model.adapter_init import lora_layers
from unlora.model.lora import LoRAModelForCausalLM
from unlora.model.probe import Probe
from unlora.model.reference import POLICY
from unlora.trainer.orthogonal import added, keep_orthogonal


@pytest.fixture
def adapters(tmp_path):
    """A fine-tuned adapter and one that unlearned on top of it, as folders of runs."""
    below = make_root(tmp_path / "root")
    for mode, rank in (("finetune", 4), ("unlearn", 3)):
        folder = make_adapter(str(tmp_path / "root"), tmp_path / mode, r=rank)
        file = folder / "adapter_config.json"
        settings = json.loads(file.read_text())
        file.write_text(json.dumps({**settings, "base_model_name_or_path": str(below)}))
        (folder / "run_config.json").write_text(json.dumps({"mode": mode}))
        below = folder
    return tmp_path


def rows_of_a(folder):
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): tensor
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
        if "lora_A" in name
    }


@pytest.mark.parametrize("lineage", ["merge", "stack"])
def test_the_loss_is_that_of_the_paper_and_starts_at_nothing(adapters, lineage):
    model = LoRAModelForCausalLM.from_pretrained(
        str(adapters / "unlearn"), {**LORA, "r": 8}, lineage=lineage
    )
    before, a = Probe.take(model), lambda name: lora_layers(model)[name].lora_A[POLICY].weight
    lengths = {name: a(name).norm(dim=1) for name in lora_layers(model)}
    penalty = keep_orthogonal(model, 0.5)
    assert before.difference(model)[0] == 0 and penalty(model).item() < 1e-8
    for name, length in lengths.items():
        torch.testing.assert_close(a(name).norm(dim=1), length)
        a(name).data += 0.1
    earlier = rows_of_a(adapters / "unlearn")
    assert earlier.keys() == lengths.keys()
    value = sum((earlier[name] @ a(name).T).square().sum() for name in earlier)
    torch.testing.assert_close(penalty(model), 0.5 * value)
    torch.testing.assert_close(added(penalty, None, penalty)(model), value)


def test_a_first_request_has_nothing_to_be_orthogonal_to(adapters):
    model = LoRAModelForCausalLM.from_pretrained(str(adapters / "finetune"), LORA)
    assert keep_orthogonal(model, 0.5) is None and added(None, None) is None


def test_an_adapter_for_which_no_directions_are_left_is_refused(adapters):
    model = LoRAModelForCausalLM.from_pretrained(str(adapters / "unlearn"), {**LORA, "r": 30})
    with pytest.raises(
        InputError, match=r"read 3 of the 32 directions of .*q_proj, so 29 are left"
    ):
        keep_orthogonal(model, 0.5)
