"""Tiny models, data and tokenizers that the tests make themselves."""

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from unlora.data.chat_encoding import Encoded
from unlora.forward import IGNORE_INDEX

VOCABULARY = 300
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # logits of a few units, so that a wrong model shows
}
LORA = {
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"],
}


def llama(*, tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0, **shape):
    """A random Llama whose logits are a few units large."""
    torch.manual_seed(seed)
    config = LlamaConfig(**{**SHAPE, **shape}, tie_word_embeddings=tied)
    return LlamaForCausalLM(config).to(dtype)


def qwen2(*, tied: bool = True, seed: int = 0, **shape):
    """A random Qwen2, tied like the real ones up to 3B."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**{**SHAPE, **shape}, tie_word_embeddings=tied))


def adapted(model=None, *, seed: int = 0, **lora):
    """A model with an adapter that does something."""
    model = get_peft_model(model or llama(), LoraConfig(**{**LORA, **lora}))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1, generator=generator)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and turn tokens with a chat template; pad differs from end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|end|>", pad_token="<|pad|>", bos_token="<|begin|>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    fast.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return fast


def rows(lengths: list[int], *, prompt: int = 4, seed: int = 0) -> list[Encoded]:
    """Random rows with these numbers of scored tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(1, VOCABULARY, (prompt + length,), generator=generator).tolist()
        made.append(Encoded(ids, [IGNORE_INDEX] * prompt + ids[prompt:]))
    return made
