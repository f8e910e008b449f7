"""Adapters that plain peft makes, as other programs do, and how they are spoiled."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import LORA, llama, tokenizer
from transformers import AutoModelForCausalLM

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def make_root(folder, model=None):
    (model or llama()).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def make_adapter(root, folder, *, save=None, **config):
    """A trained-looking adapter, made by plain peft as other programs do."""
    model = AutoModelForCausalLM.from_pretrained(root)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{**LORA, **config}))
    generator = torch.Generator().manual_seed(1)
    for _, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(str(folder), **{"save_embedding_layers": False, **(save or {})})
    return folder


def edit(folder: Path, **changed) -> None:
    file = folder / SETTINGS
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in (settings | changed).items() if v is not ...}))


def retensor(folder: Path, change) -> None:
    tensors = change(load_file(folder / WEIGHTS))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def plain_answers(root, folder, ids):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root), str(folder))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits
