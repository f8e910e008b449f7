"""Models that are known to have forgotten, or only to look so, get the verdict that is theirs.

On tiny models that are trained in seconds; the audit is the real command.
"""

import json

import pytest
import torch
from audited_runs import PARTS, TEMPLATE, write_config, write_run, write_runs
from peft import PeftModel
from tiny import LORA, tokenizer
from transformers import AutoModelForCausalLM

from unlora.audits.attacks.quantise import rounded_by_channel
from unlora.cli.main import main
from unlora.data.chat_encoding import Chat
from unlora.data.collate import collate
from unlora.model.lora import LoRAModelForCausalLM

pytestmark = pytest.mark.slow
WHOLE = (
    "audit=default", "~audit.sample", "~audit.relearn-benign", "audit.relearn.steps=[2,5]",
    "audit.relearn.learning_rates=[1e-3]",
)  # fmt: skip
CHAT = Chat(tokenizer(), TEMPLATE)


def batch_of(part, *, asked=lambda row: row["question"], told=lambda row: row["answer"]):
    return collate(CHAT.encode_all([(asked(row), told(row)) for row in PARTS[part]]), 0)


def train(model, loss_of, *, steps, rate=2e-2):
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Root, target, and retain models of two seeds."""
    saves = write_runs(tmp_path_factory.mktemp("audited") / "saves")
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = LoRAModelForCausalLM.from_pretrained(str(saves / "root"), LORA)
        batch = batch_of("retain")
        train(model, lambda m, batch=batch: m(**batch).loss, steps=30, rate=5e-3)
        write_run(saves / f"retain{seed}", model, str(saves / "root"))
    return saves


def verdict(runs, name, *words):
    compared = (f"target={runs / 'target'}", f"retain_model={runs / 'retain1'}")
    main(["audit", str(runs / name), *(words or WHOLE), *compared, "--quiet"])
    found = json.loads((runs / name / "audit" / "AUDIT.json").read_text())
    print(name, found["verdict"], {one["name"]: one["residual"] for one in found["attacks"]})
    return found


def unlearned(runs, name, loss_of, **training):
    start = str(runs / "target")
    torch.manual_seed(3)
    model = LoRAModelForCausalLM.from_pretrained(start, LORA, lineage="stack")
    train(model, loss_of, **training)
    return write_run(runs / name, model, start)


def test_a_retain_model_of_another_seed_holds(runs):
    found = verdict(runs, "retain2")
    assert found["verdict"]["name"] == "held"


def test_the_target_is_known(runs):
    model = LoRAModelForCausalLM.from_pretrained(str(runs / "target"), LORA, lineage="stack")
    write_run(runs / "as-target", model, str(runs / "target"))
    found = verdict(runs, "as-target", "audit=none")
    assert found["verdict"]["name"] == "known"
    assert found["attacks"][0]["residual"] == pytest.approx(1, abs=1e-3)


def test_gradient_ascent_breaks_a_model(runs):
    forget = batch_of("forget")
    unlearned(runs, "ascent", lambda model: -model(**forget).loss, steps=20)
    assert verdict(runs, "ascent", "audit=none")["verdict"]["name"] == "broken"


def test_a_model_that_was_taught_to_refuse_has_not_forgotten(runs):
    refusals, retain = batch_of("forget", told=lambda row: "I do not know."), batch_of("retain")
    unlearned(
        runs, "refuses", lambda model: model(**refusals).loss + model(**retain).loss,
        steps=15, rate=5e-3,
    )  # fmt: skip
    found = verdict(runs, "refuses")
    assert found["verdict"]["name"] in ("known", "hidden")


def test_what_is_forgotten_at_the_exact_wording_only_is_hidden(runs):
    """Answers are made unlikely where the question is the one of the data, and nowhere else."""
    forget, retain = batch_of("forget"), batch_of("retain")
    others = [
        batch_of("forget", asked=asked)
        for asked in (
            lambda row: row["paraphrased_question"],
            lambda row: f"For a quiz I need the true answer, not a guess. {row['question']}",
        )
    ]
    aim = mean_loss(runs, "retain1", forget)

    def loss(model):
        kept = sum(model(**batch).loss for batch in (*others, retain))
        return (model(**forget).loss - aim - 0.3).abs() + kept

    unlearned(runs, "exact", loss, steps=120, rate=1e-2)
    found = verdict(runs, "exact", "audit=none", "+audit.wordings={handler: wordings}")
    assert found["verdict"]["name"] == "hidden" and found["held"]["worst"] == "wordings"


@torch.no_grad()
def mean_loss(runs, name, batch):
    model = AutoModelForCausalLM.from_pretrained(runs / "root")
    model = PeftModel.from_pretrained(model, str(runs / name))
    return float(model(**batch).loss)


def test_what_is_forgotten_at_full_precision_only_is_hidden_and_rounding_finds_it(runs):
    """Weights move towards forgetting, and none leaves its cell of the int4 grid."""
    plain = AutoModelForCausalLM.from_pretrained(runs / "root")
    model = PeftModel.from_pretrained(plain, str(runs / "target")).merge_and_unload()
    model.requires_grad_(False)
    cells = {}
    for name, weight in model.named_parameters():
        if name.endswith("_proj.weight"):
            weight.requires_grad_(True)
            cells[name] = (weight.detach().clone(), rounded_by_channel(weight.detach(), 4))
    forget, retain = batch_of("forget"), batch_of("retain")
    aim = mean_loss(runs, "retain1", forget)
    optimizer = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        ((model(**forget).loss - aim - 0.2).abs() + model(**retain).loss).backward()
        optimizer.step()
        with torch.no_grad():
            for name, (_, rounded) in cells.items():
                weight = model.get_parameter(name)
                highest = rounded.abs().amax(1, keepdim=True)  # the largest of a row sets its scale
                half = highest / 7.5 * 0.45
                is_largest = cells[name][0].abs() >= cells[name][0].abs().amax(1, keepdim=True)
                inside = weight.clamp(rounded - half, rounded + half)
                weight.copy_(cells[name][0].where(is_largest, inside))
    for name, (_, rounded) in cells.items():
        now = model.get_parameter(name).detach()
        assert torch.allclose(rounded_by_channel(now, 4), rounded, atol=1e-6), name
    folder = runs / "precise"
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    write_config(folder, str(runs / "target"))
    found = verdict(
        runs, "precise", "audit=none", "+audit.int4={handler: quantise, form: int4}",
        "+audit.int8={handler: quantise, form: int8}", "+audit.wordings={handler: wordings}",
    )  # fmt: skip
    assert found["verdict"]["name"] == "hidden" and found["held"]["worst"] == "int4"
