"""Open-Unlearning's losses in a plain loop over a peft model train the adapter that ours train.

Slow: needs a real model (UNLORA_REALDATA). Every step sees all forget rows and one retain row, so
that the order of the rows, which the seeds of two programs draw otherwise, makes no difference.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from unlora.cli.main import main
from unlora.data.chat_encoding import Chat
from unlora.data.collate import collate
from unlora.model import load_tokenizer, resolve_model

FORGET = [
    ("Who wrote it?", "Anna wrote it."),
    ("Where did Tom live?", "Tom lived in a big red house by the sea."),
    ("What did Lily eat?", "Lily ate two apples and a cake."),
    ("Who was sad?", "Ben."),
]
RETAIN = [("What was the dog called?", "The dog was called Max, and he liked to play.")]
STEPS, RATE, BETA, ALPHA = 6, 3e-4, 0.1, 2.0
EPSILON = 1e-4  # with the default, 1e-8, Adam makes whole steps of gradients that are rounding


def nll_of_rows(model, batch):
    """compute_batch_nll of Open-Unlearning: one sum of token losses a row."""
    logits = model(batch["input_ids"]).logits  # rows are padded at their end
    losses = F.cross_entropy(
        logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none"
    )
    return losses.sum(-1)


def nll(model, batch):
    """The loss of transformers: a mean over the scored tokens."""
    return nll_of_rows(model, batch).sum() / (batch["labels"][:, 1:] != -100).sum()


def npo(policy, reference, forget):
    with torch.no_grad():
        before = nll_of_rows(reference, forget)
    log_ratio = before - nll_of_rows(policy, forget)
    return (-2 / BETA * F.logsigmoid(-BETA * log_ratio)).mean()


def peers_adapter(method, root, target, forget, retain):
    """The adapter after the peer's loop."""

    def load(trainable):
        base = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
        return PeftModel.from_pretrained(base, target, is_trainable=trainable)

    policy, reference = load(True), load(False)
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, eps=EPSILON, weight_decay=0.01)
    for _ in range(STEPS):
        loss = npo(policy, reference, forget) if method == "NPO" else -nll(policy, forget)
        loss = loss + ALPHA * nll(policy, retain)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)  # as transformers' Trainer does
        optimizer.step()
    return {
        name.replace(".default", ""): w for name, w in policy.named_parameters() if "lora" in name
    }


@pytest.mark.slow
@pytest.mark.parametrize("method", ["NPO", "GradDiff"])
def test_the_peers_loss_in_a_plain_loop_trains_the_same_adapter(
    method, realdata, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    root = realdata / "tiny_lm" / "stories260K" / "hf"
    for name, pairs in (("forget", FORGET), ("retain", RETAIN), ("both", [*FORGET, *RETAIN])):
        rows = [json.dumps({"question": q, "answer": a}) for q, a in pairs]
        Path(f"{name}.jsonl").write_text("\n".join(rows), "utf-8")
    plain = ["trainer.args.lr_scheduler_type=constant", "trainer.args.warmup_epochs=0",
             f"trainer.args.learning_rate={RATE}", f"trainer.args.adam_epsilon={EPSILON}",
             "trainer.args.gradient_accumulation_steps=1",
             "trainer.args.report_to=none", "model.lora_config.lora_dropout=0"]  # fmt: skip
    target, made = Path("saves/finetune/target"), Path("saves/unlearn/made")
    main(["train", "experiment=finetune/own/lora", f"model={root}", "data.train=both.jsonl", *plain,
          "model.lora_config.r=4", "trainer.args.num_train_epochs=5",
          "task_name=target"])  # fmt: skip
    main(["unlearn", "experiment=unlearn/own/lora", f"model={target}", "model.lineage=continue",
          "data.forget=forget.jsonl", "data.retain=retain.jsonl", f"trainer={method}", "~eval",
          f"trainer.method_args.alpha={ALPHA}", f"trainer.args.num_train_epochs={STEPS}",
          *plain, "task_name=made"])  # fmt: skip

    section = json.loads((made / "run_config.json").read_text())["model"]
    model = resolve_model(section)
    chat = Chat(load_tokenizer(model), model.section.template_args)
    forget, retain = (
        collate(chat.encode_all(pairs), chat.tokenizer.pad_token_id) for pairs in (FORGET, RETAIN)
    )
    theirs = peers_adapter(method, root, target, forget, retain)
    ours = load_file(made / "adapter_model.safetensors")
    before = load_file(target / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys() == before.keys()
    assert max((ours[name] - before[name]).abs().max() for name in ours) > RATE
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name].detach(), atol=1e-5, rtol=0)
