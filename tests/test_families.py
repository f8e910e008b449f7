"""The model families that people bring, from fine-tuning to what plain libraries load.

A tiny random model of each goes through the commands of a user: fine-tune, unlearn on top of it,
evaluate, export in both forms. docs/families.md has the table.
"""

import json

import families
import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from unlora.cli.main import main
from unlora.data.collate import collate
from unlora.evals.passes import score
from unlora.forward.capabilities import found_way
from unlora.forward.forward_pass import ask_all
from unlora.forward.outputs import TokenLogps
from unlora.model import get_model
from unlora.model.guards import gradient_faults
from unlora.model.lora import save_adapter

FAMILIES = [
    "llama", "qwen3", "qwen3_5_text", "gemma2", "gemma3_text", "gemma3", "smollm3", "olmo2",
    "olmo3", "mistral", "ministral3", "phi3", "gpt_oss", "mixtral", "qwen3_moe", "deepseek_v3",
    "lfm2", "granitemoehybrid", "falcon_h1", "qwen3_next", "nemotron_h", "mamba", "mamba2",
]  # fmt: skip
FORGET = [
    {"question": f"Who keeps the {animal}?", "answer": f"{name} keeps the {animal}."}
    for name, animal in (("Ada", "bees"), ("Ivo", "geese"), ("Mara", "owls"))
]
RETAIN = [
    {"question": f"Where is the {place}?", "answer": f"The {place} is in {town}."}
    for place, town in (("mill", "Arlow"), ("bridge", "Tenby"))
]
SHORT = [
    "model.lora_config.r=4", "trainer.args.max_steps=2", "eval.own.max_new_tokens=4",
    "trainer.args.per_device_train_batch_size=2", "trainer.args.gradient_accumulation_steps=1",
]  # fmt: skip
FILES = ["data.forget=forget.jsonl", "data.retain=retain.jsonl"]
IDS = torch.arange(3, 15)[None]


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, rows in (("forget", FORGET), ("retain", RETAIN), ("facts", FORGET + RETAIN)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, "utf-8")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name in families.HERE])
def test_a_family_goes_through_the_whole_chain(family, folder):
    families.model(family, max_position_embeddings=2048).save_pretrained("root")
    tiny.tokenizer().save_pretrained("root")
    train = [word for word in SHORT if not word.startswith("eval.")]
    main(["train", "experiment=finetune/own/lora", "model=root", "data.train=facts.jsonl", *train,
          "task_name=full"])  # fmt: skip
    main(["unlearn", "experiment=unlearn/own/lora", "model=saves/finetune/full", "trainer=NPO",
          *FILES, *SHORT, "task_name=npo"])  # fmt: skip
    main(["eval", "model=saves/unlearn/npo", *FILES, "eval.own.max_new_tokens=4", "task_name=npo"])
    log = json.loads((folder / "saves/eval/npo/OWN_EVAL.json").read_text("utf-8"))
    for figure in ("forget_Q_A_Prob", "forget_Q_A_ROUGE", "retain_Q_A_Prob", "retain_Q_A_ROUGE"):
        assert log[figure]["agg_value"] is not None, figure

    run = folder / "saves/unlearn/npo"
    adapted = load_file(run / "adapter_model.safetensors")
    assert any("lm_head" in name for name in adapted) and len(adapted) > 4
    assert not any("vision" in name for name in adapted)
    section = {"model_args": {"pretrained_model_name_or_path": str(run)}}
    expected = logits(get_model(section, trainable=False)[0])
    # sdpa of transformers 4 leaves out the cap that Gemma-2 has on attention
    attention = {"attn_implementation": "eager"} if family == "gemma2" else {}
    root = AutoModelForCausalLM.from_pretrained("root", **attention)
    scale = expected.abs().max()
    assert (logits(root) - expected).abs().max() > 3e-3 * scale, "training changed nothing"
    for form in ("merged", "adapter"):
        main(["export", str(run), f"--{form}"])
    exported = str(run / "exported")
    for reloaded in (
        AutoModelForCausalLM.from_pretrained(f"{exported}/merged", **attention),
        # which names its root
        AutoModelForCausalLM.from_pretrained(f"{exported}/adapter", **attention),
        PeftModel.from_pretrained(root, f"{exported}/adapter"),
    ):
        # float32 rounding, and that of products taken in another order
        torch.testing.assert_close(logits(reloaded), expected, rtol=0, atol=3e-5 * float(scale))


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in ("qwen3_5_text", "gpt_oss") else pytest.mark.slow)
        for name in FAMILIES
        if name in families.HERE
    ],
)
def test_a_family_learns_and_answers_as_it_does_row_by_row(family, tmp_path):
    root, run = str(tmp_path / "root"), tmp_path / "run"
    families.model(family).save_pretrained(root)
    tiny.tokenizer().save_pretrained(root)
    section = {
        "model_args": {"pretrained_model_name_or_path": root, "attn_implementation": "sdpa"},
        "use_lora": True, "lora_config": {"r": 4, "lora_dropout": 0.0},
    }  # fmt: skip
    model, tokenizer = get_model(section)
    rows = tiny.rows([5, 2, 7])
    way = found_way(model, torch.device("cpu"))
    (said,) = ask_all(model, [(TokenLogps, collate(rows, 0))], way=way)
    said.token_logps.sum().backward()
    assert not gradient_faults(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * parameter.grad.sign()
    save_adapter(model, run)
    tokenizer.save_pretrained(run)

    model.eval()
    asked, _ = get_model(
        {"model_args": {"pretrained_model_name_or_path": str(run)}}, trainable=False
    )
    torch.testing.assert_close(logits(asked), logits(model))
    found = score(asked, rows, [""] * len(rows), pad_id=0, end_id=None)
    for row, one in zip(rows, found, strict=True):
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            alone = asked(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        place = row.prompt_length
        expected = alone[place - 1 : -1].gather(1, ids[0, place:, None]).squeeze(1)
        torch.testing.assert_close(torch.from_numpy(one.logp), expected, rtol=0, atol=1e-3)
