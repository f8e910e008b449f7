"""The small language model that pocket starts from, pre-trained where it is first needed."""

import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from unlora.data.cache import cache_folder
from unlora.data.pocket import world

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from unlora.data.chat_encoding import Encoded

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Settings:
    """The size of the base and how it is trained."""

    seed: int = 0
    vocab_size: int = 1792
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    num_authors: int = 250
    fact_share: float = 0.3  # of the rows are about the real world
    num_rows: int = 24_000
    batch_size: int = 64
    matrix_lr: float = 0.015
    lr: float = 0.004

    def key(self) -> str:
        """A hash of all that determines the bytes of the base."""
        made_of = [
            asdict(self),
            CHAT_TEMPLATE,
            {package: version(package) for package in ("torch", "transformers", "tokenizers")},
            pretraining_pairs(self),
            [
                Path(__file__).with_name(f"{name}.py").read_text("utf-8")
                for name in ("base", "muon")
            ],
        ]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]


def pretraining_pairs(settings: Settings) -> list[tuple[str, str]]:
    """Questions and answers about other authors and the real world, in the order of training."""
    draw = random.Random(settings.seed)
    people = [
        pair
        for author in world.other_authors(settings.num_authors)
        for pair in world.author_pairs(author)
    ]
    facts = world.fact_pairs()
    num_facts = int(settings.num_rows * settings.fact_share)
    pairs = draw.choices(people, k=settings.num_rows - num_facts) + draw.choices(facts, k=num_facts)
    draw.shuffle(pairs)
    return pairs


def build(folder: Path, settings: Settings) -> None:
    """Train the base from nothing and save it in ``folder``, in Hugging Face's format."""
    pairs = pretraining_pairs(settings)
    tokenizer = train_tokenizer(pairs, settings.vocab_size)
    model = pretrain(tokenizer, pairs, settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer(pairs: Sequence[tuple[str, str]], vocab_size: int) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer, so any text can be asked about."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for pair in pairs for text in pair), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def pretrain(
    tokenizer: "PreTrainedTokenizerFast", pairs: Sequence[tuple[str, str]], settings: Settings
) -> "LlamaForCausalLM":
    """A Llama that answers these questions, after one pass over them."""
    import torch
    from tqdm import tqdm

    from unlora.data.chat_encoding import Chat
    from unlora.data.collate import collate
    from unlora.data.pocket.muon import Muon
    from unlora.forward.forward_pass import ask

    chat = Chat(tokenizer, {"apply_chat_template": True})
    encoded = {pair: chat.encode(*pair) for pair in dict.fromkeys(pairs)}
    batches = batches_of_like_length([encoded[pair] for pair in pairs], settings)
    model = new_model(tokenizer, settings)
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    matrix_ids = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in matrix_ids]
    optimizers = [
        Muon(matrices, lr=settings.matrix_lr),
        torch.optim.AdamW(others, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / 30, 1.5 * (1 - step / len(batches)))
        )
        for optimizer in optimizers
    ]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the bytes must not depend on the number of cores
    try:
        for batch in tqdm(batches, desc="Pre-training the base of pocket, once", unit="step"):
            loss = -ask(model, collate(batch, tokenizer.pad_token_id)).token_logps.mean()
            loss.backward()
            for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    finally:
        torch.set_num_threads(num_threads)
    return model


def new_model(tokenizer: "PreTrainedTokenizerFast", settings: Settings) -> "LlamaForCausalLM":
    """A Llama with random weights; the random state of the process stays as it was."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        num_key_value_heads=settings.num_key_value_heads,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return LlamaForCausalLM(config)


def batches_of_like_length(
    encoded: "Sequence[Encoded]", settings: Settings
) -> "list[list[Encoded]]":
    """Batches with little padding; the order of the rows changes only within a short stretch."""
    size, draw = settings.batch_size, random.Random(settings.seed)
    batches = []
    for start in range(0, len(encoded), size * 16):
        stretch = sorted(encoded[start : start + size * 16], key=lambda row: len(row.input_ids))
        parts = [stretch[i : i + size] for i in range(0, len(stretch), size)]
        draw.shuffle(parts)
        batches += parts
    return batches


def cached(settings: Settings) -> Path:
    """The folder of the base; trained on first use, whole or not there at all."""
    from filelock import FileLock

    folder = cache_folder() / f"pocket-{settings.key()}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
            try:
                build(unfinished, settings)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder
