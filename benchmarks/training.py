"""One optimiser step of five methods, beside how they are trained today, and the least it can take.

make bench                                     S and M on the CPU, into benchmarks/results
python benchmarks/training.py --size S --methods NPO,RMU --ranks 16
python benchmarks/training.py --size M --methods NPO --against packs         what packing brings
python benchmarks/training.py --size 3B --device cuda --dtype bfloat16       on a GPU
python benchmarks/training.py --size R --dropout 0.05 --threads 1            SmolLM2-135M-Instruct

A step is 4 micro-batches of 4 forget and 4 retain rows of TOFU (random words in rows of like length
where UNLORA_REALDATA and ../shared/realdata are not there), LoRA on all linear layers and the head,
no dropout, so that losses can be compared. Size R is the model that UNLORA_REAL_MODEL names
(SmolLM2-135M-Instruct's shape is counted): one micro-batch a step, no LoRA on the head. Ours is
``experiment=unlearn/tofu/lora`` with gradient checkpointing off, as it is in the baseline
(``baseline_training.py``).

For every method each side is a process; they take turns, step by step, and never run at the same
time. A time is a median. What ours asks the reference before the first step is spread over the
steps of the 5 epochs of a run, and counted. With --threads 1 on a CPU it is CPU time. Memory is the
highest resident memory of the process while it trains, above what it was before the model was made
(on a GPU what torch has allocated); a training of a very small model comes before, so that
libraries which are loaded at first use are there. With --memory, memory is what is in use: a freed
block goes back to the system at once, and times are not worth reading.

The floor is the multiply-adds that nobody can leave out, at the rate at which the same process
multiplies matrices as large as the model's: tokens without padding, scored positions in the head,
no gradients of frozen weights, nothing above the layer that RMU looks at; of a reference nothing
where it is asked once per run. ``count_flops`` has the formula.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evaluation_rows import _made_up, realdata
from sides import Found, Side, say

METHODS = ("NPO", "GradDiff", "SimNPO", "UNDIAL", "RMU")
BATCH, ACCUMULATION, ROWS, EPOCHS = 4, 4, 128, 5
LEAST_LOSS = {"GradDiff": 1.0}  # to compare with: the difference of two losses may be anything
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
QUIET = {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Size:
    """A Qwen2's shape."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tokenizer: str
    tied: bool = True
    is_real: bool = False

    @property
    def accumulation(self) -> int:
        """Micro-batches a step."""
        return 1 if self.is_real else ACCUMULATION

    @property
    def layer(self) -> int:
        """That RMU looks at: a quarter of the depth."""
        return (self.layers - 1) // 4

    def config(self) -> Any:
        from transformers import Qwen2Config

        return Qwen2Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.feed_forward,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            tie_word_embeddings=self.tied,
        )


SIZES = {
    "R": Size(576, 1536, 30, 9, 3, 49_152, "", is_real=True),
    "tiny": Size(64, 176, 2, 4, 2, 512, ""),
    "S": Size(256, 704, 4, 4, 4, 32_000, "llama-2-7b-chat-hf", tied=False),
    "M": Size(512, 1408, 8, 8, 2, 151_936, "qwen2.5-7b-instruct"),
    "3B": Size(2048, 11008, 36, 16, 2, 151_936, "qwen2.5-7b-instruct"),
}


# --- in the process of one side ------------------------------------------------------------------


def child(side: str, options: argparse.Namespace) -> None:
    """Train, one step whenever a line comes in, and print a line of JSON for each."""
    import logging

    import torch
    from transformers import TrainerCallback, set_seed

    logging.disable(logging.WARNING)
    if options.threads:
        torch.set_num_threads(options.threads)

    class Turns(TrainerCallback):
        """Waits before every step until it is told to go; or makes two on its own."""

        waits, losses = False, None

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            if self.waits:
                say({"before": clock(options) - self.called})
            self.wait()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            synchronise(options)
            seconds = clock(options) - self.started
            if self.waits:
                say({"seconds": seconds, "loss": self.losses()})
                self.wait()
            control.should_training_stop = self.stopped if self.waits else state.global_step == 2

        def wait(self) -> None:
            self.stopped = self.waits and sys.stdin.readline().strip() != "step"
            self.started = clock(options)

    def train(size: Size, chat: Any, rows: Any) -> Found:
        before = memory(options, reset=True)
        set_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            os.environ["UNLORA_CACHE"] = folder
            make = baseline if side == "baseline" and not options.against else ours
            trainer, losses = make(size, chat, rows, folder, options)
            if options.against in RESTS_ON:
                WITHOUT[RESTS_ON[options.against]](trainer)
            if side == "baseline" and options.against:
                WITHOUT[options.against](trainer)
            turns.losses = losses
            trainer.add_callback(turns)
            if turns.waits:
                say({"versions": versions(), "device": device_name(options)})
                sys.stdin.readline()
            turns.called = clock(options)
            trainer.train()
        ended = {"memory": memory(options) - before}
        if side == "ours":
            ended |= {"seen": trainer.counted, "way": str(trainer.context.losses.way)}
        return ended

    turns = Turns()
    train(SIZES["tiny"], *data(SIZES["tiny"]))
    turns.waits = True
    size = SIZES[options.size]
    chat, rows = data(size)
    say(train(size, chat, rows))


def _packs(trainer: Any) -> None:
    losses = trainer.context.losses
    losses.way = replace(losses.way, packs=False, flat=False)


def _flat(trainer: Any) -> None:
    """Rows in several sequences, each with its own beginning."""
    losses = trainer.context.losses
    losses.way = replace(losses.way, flat=False)


def _fused(trainer: Any) -> None:
    """Every layer with LoRA by peft's own forward."""
    for module in trainer.model.modules():
        if "lora_A" in module._modules:
            vars(module).pop("forward", None)


def _chunks(trainer: Any) -> None:
    losses = trainer.context.losses
    losses.way = replace(losses.way, chunks=False)


def _joined(trainer: Any) -> None:
    losses = trainer.context.losses
    forward = losses._forward

    def one_by_one(model: Any, kinds: Mapping[str, type], inputs: Any) -> Any:
        return {
            p: a
            for part, kind in kinds.items()
            for p, a in forward(model, {part: kind}, inputs).items()
        }

    losses._forward = one_by_one


def _known(trainer: Any) -> None:
    import unlora.trainer.term_losses as module

    module.precompute = lambda *_args, **_kwargs: {}


def _positions(trainer: Any) -> None:
    """All positions meet the vocabulary, at once."""
    import torch

    import unlora.forward.forward_pass as module

    @contextmanager
    def everywhere(model: Any, places: Any, _projected: Any) -> Any:
        def select(_module: Any, _args: Any, logits: Any) -> Any:
            return logits.flatten(0, 1)[torch.cat(list(places))].unsqueeze(0)

        handle = module.output_embedding(model).register_forward_hook(select)
        try:
            yield places
        finally:
            handle.remove()

    module._before_the_head = everywhere


def _layers(_trainer: Any) -> None:
    """A pass for hidden states goes to the last layer."""
    import unlora.forward.forward_pass as module
    from unlora.forward.architecture import decoder_layers

    @contextmanager
    def never(model: Any, layer: int) -> Any:
        seen: list[Any] = []

        def keep(_module: Any, _args: Any, said: Any) -> None:
            seen.append(said[0] if isinstance(said, tuple) else said)

        handle = decoder_layers(model)[layer].register_forward_hook(keep)
        try:
            yield seen
        finally:
            handle.remove()

    module._ending_after = never


def _in_place(_trainer: Any) -> None:
    import torch.nn.functional as F

    import unlora.objectives.distill as module

    module._cross_entropy = lambda target, logits: F.cross_entropy(
        logits, target.softmax(-1), reduction="none"
    )


def _shared(trainer: Any) -> None:
    """The reference is a copy of the model before it had an adapter."""
    import copy

    import torch

    import unlora.trainer.term_losses as module

    reference = copy.deepcopy(trainer.model).unload().eval().requires_grad_(False)

    @contextmanager
    def copied(_model: Any, _frozen: Any = None) -> Any:
        with torch.no_grad():
            yield reference

    module.as_reference = copied


def _compile(trainer: Any) -> None:
    trainer.model.compile()


WITHOUT = {"known": _known, "packs": _packs, "flat": _flat, "fused": _fused,
           "joined": _joined, "positions": _positions, "chunks": _chunks, "in-place": _in_place,
           "layers": _layers, "shared": _shared, "compile": _compile}  # fmt: skip
# what is left out on both sides, as it can only be had with the other
RESTS_ON = {"packs": "joined", "positions": "chunks"}


def ours(size: Size, chat: Any, rows: Any, folder: str, options: Any) -> Any:
    """The program's trainer, as its config makes it, and what it says of its losses."""
    from unlora.cli import compose
    from unlora.config import read
    from unlora.data.pairs import Parts
    from unlora.trainer import (
        Guards,
        Plugins,
        UnlearningLoss,
        UnlearningTrainer,
        training_arguments,
    )

    overrides = [
        "experiment=unlearn/tofu/lora", f"trainer={options.method}",
        f"trainer.args.per_device_train_batch_size={BATCH}",
        f"trainer.args.gradient_accumulation_steps={size.accumulation}",
        "trainer.args.gradient_checkpointing=false", "++trainer.args.disable_tqdm=true",
        "trainer.args.report_to=none", f"++trainer.args.bf16={str(bf16(options)).lower()}",
        "trainer.args.warmup_epochs=0", *options.overrides,
    ]  # fmt: skip
    config = read(compose.composed("unlearn", overrides))
    hyper = dict(config.trainer.method_args) | {"gamma": 1.0, "alpha": 1.0}
    if options.method == "RMU":
        hyper["layer"] = size.layer
    if options.method == "UNDIAL":
        hyper["retain_loss_type"] = "NLL"
    loss = UnlearningLoss.build(config.trainer.handler, **hyper)
    parts = Parts({p: chat.encode_all(pairs(rows[p])) for p in rows}, "forget")
    args = training_arguments(config.trainer.args, output_dir=folder)
    trainer = UnlearningTrainer(
        model=model(size, options), args=args, loss=loss, parts=parts,
        plugins=Plugins(), processing_class=chat.tokenizer, callbacks=[Guards()],
    )  # fmt: skip
    seen: list[float] = []
    compute = trainer.compute_loss

    def noted(*args: Any, **kwargs: Any) -> Any:
        value = compute(*args, **kwargs)
        seen.append(float(value.detach()))
        return value

    trainer.compute_loss = noted
    trainer.counted = count_tokens(parts, size)
    return trainer, lambda: statistics.mean(seen[-size.accumulation :])


def baseline(size: Size, chat: Any, rows: Any, folder: str, options: Any) -> Any:
    """The other trainer."""
    from functools import partial

    from baseline_training import BaselineTrainer, Texts
    from transformers import TrainingArguments

    from unlora.data.collate import collate_parts
    from unlora.data.pairs import KeyedSampler, Parts
    from unlora.objectives.representation import unit_vector

    args = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=BATCH, report_to="none",
        gradient_accumulation_steps=size.accumulation, learning_rate=1e-4, num_train_epochs=5,
        disable_tqdm=True, remove_unused_columns=False, save_strategy="no", logging_strategy="no",
        use_cpu=options.device == "cpu", bf16=bf16(options), weight_decay=0.01,
        seed=42, optim="adamw_torch",
    )  # fmt: skip
    parts = Parts(rows, "forget")
    trainer = BaselineTrainer(
        model=model(size, options), args=args, method=options.method,
        train_dataset=Texts(chat, rows["forget"], rows["retain"]),
        data_collator=partial(collate_parts, pad_id=chat.tokenizer.pad_token_id),
        order=KeyedSampler(parts, 42), layer=size.layer,
        control=unit_vector(size.hidden, 42).to(options.device), careful=options.careful,
    )  # fmt: skip
    return trainer, lambda: statistics.mean(trainer.losses[-size.accumulation :])


def model(size: Size, options: Any) -> Any:
    """A model with a fresh adapter; the first steps move it away from its reference."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    if size.is_real:
        made = AutoModelForCausalLM.from_pretrained(real_model(), dtype=dtype).to(options.device)
    else:
        with torch.device(options.device):
            made = AutoModelForCausalLM.from_config(size.config(), dtype=dtype)
    targets = "q_proj v_proj k_proj o_proj gate_proj down_proj up_proj".split()
    targets += [] if size.is_real else ["lm_head"]
    settings = LoraConfig(
        r=options.rank, lora_alpha=options.rank, lora_dropout=options.dropout, bias="none",
        target_modules=targets, task_type="CAUSAL_LM",
    )  # fmt: skip
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on a tied head
        made = get_peft_model(made, settings)
    memory(options, reset=True)  # of what it took to make the model
    return made


def data(size: Size) -> tuple[Any, Mapping[str, Sequence[Any]]]:
    """How the model is asked, and the rows of both parts."""
    from transformers import AutoTokenizer

    from unlora.data.chat_encoding import Chat
    from unlora.data.pocket.base import train_tokenizer
    from unlora.data.rows import read_file

    source = realdata()
    if source and (size.tokenizer or size.is_real):
        names = {"forget": "forget10", "retain": "retain90"}
        rows = {part: read_file(source / "tofu" / f"{n}.json")[:ROWS] for part, n in names.items()}
        folder = real_model() if size.is_real else source / "tokenizers" / size.tokenizer
        tokenizer = AutoTokenizer.from_pretrained(folder)
    elif size.is_real:
        sys.exit("The rows of TOFU are not here. Set UNLORA_REALDATA to the folder that has tofu/.")
    else:
        names = {"forget": "forget10_perturbed", "retain": "retain_perturbed"}
        rows = {part: _made_up(name)[:ROWS] for part, name in names.items()}
        tokenizer = train_tokenizer([pair for r in rows.values() for pair in pairs(r)], 500)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.chat_template:
        return Chat(tokenizer, {"apply_chat_template": True}), rows
    tags = {"user_start_tag": "[INST] ", "user_end_tag": " [/INST]"}
    return Chat(tokenizer, tags), rows


def pairs(rows: Sequence[Any]) -> list[tuple[str, str]]:
    return [(row["question"], row["answer"]) for row in rows]


def real_model() -> str:
    """The folder of size R."""
    folder = os.environ.get("UNLORA_REAL_MODEL", "")
    if not Path(folder, "config.json").is_file():
        sys.exit(f"There is no model in {folder!r}. Set UNLORA_REAL_MODEL to the folder of one.")
    return folder


def clock(options: Any) -> float:
    """Seconds of this process, of one thread; else of the day, as threads wait for each other."""
    return time.process_time() if is_cpu_time(options) else time.perf_counter()


def is_cpu_time(options: Any) -> bool:
    return options.device == "cpu" and options.threads == 1


def bf16(options: Any) -> bool:
    return options.dtype == "bfloat16"


# --- the floor -----------------------------------------------------------------------------------


def count_tokens(parts: Any, size: Size) -> Found:
    """Of each part, the tokens and scored tokens of an average step."""
    found: Found = {}
    for part, rows in parts.rows.items():
        scale = BATCH * size.accumulation / len(rows)
        found[part] = {
            "tokens": scale * sum(len(row.input_ids) for row in rows),
            "scored": scale * sum(len(row.input_ids) - row.prompt_length for row in rows),
            "squares": scale * sum(len(row.input_ids) ** 2 / 2 for row in rows),
        }
    return found


def count_flops(size: Size, rank: int, method: str, seen: Found) -> float:
    """Floating-point operations of one step, two for a multiply-add.

    Forward, each weight meets each token once. Backward, once more for the gradient of its input;
    frozen weights have none of their own, the adapters' two factors have. Attention is causal:
    half of the square of each row's length. A reference is run for UNDIAL's forget rows and for
    the states of RMU's retain rows.
    """
    hidden, wide = size.hidden, size.feed_forward
    narrow = hidden // size.heads * size.key_value_heads
    shapes = [(hidden, hidden)] * 2 + [(hidden, narrow)] * 2 + [(hidden, wide)] * 3
    weights = sum(a * b for a, b in shapes)
    adapters = sum(rank * (a + b) for a, b in shapes)
    head = hidden * size.vocabulary
    head_adapter = 0 if size.is_real else rank * (hidden + size.vocabulary)
    layers = size.layer + 1 if method == "RMU" else size.layers
    total = 0.0
    for part, n in seen.items():
        attention = 2 * hidden * n["squares"]  # scores, and values
        scored = 0 if method == "RMU" else n["scored"]
        forward = layers * (n["tokens"] * weights + attention) + scored * head
        learnt = layers * n["tokens"] * adapters + scored * head_adapter
        backward = layers * (n["tokens"] * weights + 2 * attention) + scored * head + 2 * learnt
        asked = (method, part) in (("UNDIAL", "forget"), ("RMU", "retain"))
        total += forward + learnt + backward + (forward if asked else 0)
    return 2 * total


def multiply_rate(size: Size, options: Any) -> float:
    """Floating-point operations a second, of matrix products of this model's size."""
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    dtype, tokens = getattr(torch, options.dtype), 512
    with torch.device(options.device):
        pairs_of = [
            (torch.randn(tokens, size.hidden, dtype=dtype), torch.randn(size.feed_forward,
             size.hidden, dtype=dtype)),
            (torch.randn(tokens // 2, size.hidden, dtype=dtype), torch.randn(
                min(size.vocabulary, 32_000), size.hidden, dtype=dtype)),
        ]  # fmt: skip
    rates = []
    for a, b in pairs_of:
        a @ b.T
        synchronise(options)
        repeats = 20
        started = clock(options)
        for _ in range(repeats):
            a @ b.T
        synchronise(options)
        seconds = clock(options) - started
        rates.append(2 * a.shape[0] * a.shape[1] * b.shape[0] * repeats / seconds)
    return max(rates)


def peak_rate(options: Any) -> float:
    """Floating-point operations a second, of a product of large square matrices."""
    import torch

    size = 8192
    a, b = torch.randn(2, size, size, dtype=getattr(torch, options.dtype), device=options.device)
    a @ b
    synchronise(options)
    started = time.perf_counter()
    for _ in range(10):
        a @ b
    synchronise(options)
    return 20 * size**3 / (time.perf_counter() - started)


def synchronise(options: Any) -> None:
    if options.device == "cuda":
        import torch

        torch.cuda.synchronize()


def memory(options: Any, *, reset: bool = False) -> int:
    """The highest use in bytes since the last reset; with ``reset``, what is used now."""
    import gc

    import torch

    if options.device == "cuda":
        if not reset:
            return torch.cuda.max_memory_allocated()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if reset:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", "utf-8")
    field = "VmRSS:" if reset else "VmHWM:"
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(field))


def versions() -> str:
    from importlib import metadata

    names = ("unlora", "torch", "transformers", "peft")
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(name)
    return f"Python {sys.version.split()[0]}, " + ", ".join(found)


def device_name(options: Any) -> str:
    import platform

    import torch

    if options.device == "cuda":
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads"


# --- in the process that starts the others -------------------------------------------------------


def start_side(name: str, method: str, rank: int, options: argparse.Namespace) -> Side:
    """A process that makes a step whenever it is told to."""
    asked = ["--side", name, "--method", method, "--rank", str(rank)]
    environment = os.environ | QUIET | (ALLOCATOR if options.memory else {})
    return Side(__file__, [*sys.argv[1:], *asked], environment)


def main() -> None:
    options = parsed()
    if options.side:
        child(options.side, options)
        return
    names = ("ours",) if options.without_baseline else ("ours", "baseline")
    found = []
    for method in options.methods:
        for rank in options.ranks:
            with ExitStack() as stack:
                sides = {}
                for name in names:
                    sides[name] = stack.enter_context(start_side(name, method, rank, options))
                found.append(compared(method, rank, sides, options))
            print(row(found[-1]), flush=True)
    if options.output:
        Path(options.output).write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def compared(method: str, rank: int, sides: Mapping[str, Side], options: Any) -> Found:
    """Both sides on one method, in turns."""
    about = {name: side.read() for name, side in sides.items()}["ours"]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    # what is done once for all rows, as a share of one step
    rows_a_step = BATCH * SIZES[options.size].accumulation
    once = {
        name: side.tell("begin")["before"] * rows_a_step / ROWS / EPOCHS
        for name, side in sides.items()
    }
    rates = []
    for _ in range(options.steps):
        for name, side in sides.items():
            step = side.tell("step")
            losses[name].append(step["loss"])
            seconds[name].append(step["seconds"] + once[name])
        rates.append(multiply_rate(SIZES[options.size], options))
    ends = {name: side.tell("stop") for name, side in sides.items()}
    flops = count_flops(SIZES[options.size], rank, method, ends["ours"]["seen"])
    tokens = sum(part["tokens"] for part in ends["ours"]["seen"].values())
    found = {
        "size": options.size, "method": method, "rank": rank, "rates": rates, "flops": flops,
        "tokens": tokens, "steps": options.steps, "way": ends["ours"]["way"],
        "seconds": {name: statistics.median(s) for name, s in seconds.items()},
        "memory": {name: end["memory"] for name, end in ends.items()},
        "floor": flops / statistics.median(rates), "losses": losses, "once": once,
        "machine": about["device"], "versions": about["versions"],
    }  # fmt: skip
    # each with the rate just after it, so that a machine that is busy for a while slows both
    found["over_floor"] = statistics.median(
        s * rate / flops for s, rate in zip(seconds["ours"], rates, strict=True)
    )
    if options.device == "cuda":
        # of the highest rate that this card reaches on any matrix product
        found["share_of_peak"] = flops / found["seconds"]["ours"] / peak_rate(options)
    if "baseline" in sides:
        ratios = [b / a for a, b in zip(seconds["ours"], seconds["baseline"], strict=True)]
        found["faster"] = statistics.median(ratios)
        found["memory_share"] = found["memory"]["ours"] / found["memory"]["baseline"]
        found["difference"] = max(
            abs(a - b) / max(abs(b), LEAST_LOSS.get(method, 0.0))
            for a, b in zip(losses["ours"], losses["baseline"], strict=True)
        )
    return found


def row(found: Found) -> str:
    text = f"{found['size']:4} {found['method']:9} r {found['rank']:3} "
    text += f"ours {found['seconds']['ours']:7.3f} s  x floor {found['over_floor']:5.2f}  "
    text += f"peak {found['memory']['ours'] / 1e6:7.0f} MB  "
    if "share_of_peak" in found:
        text += f"{found['tokens'] / found['seconds']['ours']:7.0f} tokens/s  "
        text += f"{found['share_of_peak']:.1%} of peak  "
    if "faster" in found:
        text += f"faster {found['faster']:5.2f} x  memory {found['memory_share']:5.2f} x  "
        text += f"loss differs by {found['difference']:.1e}"
    return text


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="S")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--ranks", default="16")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--dropout", type=float, default=0.0, help="of LoRA; losses then differ")
    parser.add_argument(
        "--memory", action="store_true", help="freed blocks go back at once: slower"
    )
    parser.add_argument(
        "--careful",
        action="store_true",
        help="the baseline without losses and copies that it could "
        "leave out easily; no change for GradDiff",
    )
    parser.add_argument("--output", help="a JSON file")
    parser.add_argument("--without-baseline", action="store_true")
    parser.add_argument(
        "--against", choices=list(WITHOUT), help="ours without this, or with compile"
    )
    parser.add_argument("--overrides", default="", help="of the config of ours, by commas")
    for name, kind in (("side", str), ("method", str), ("rank", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.careful and options.against:
        parser.error("--careful is about the baseline, which --against leaves out.")
    if options.size == "R":
        real_model()
    options.methods = options.methods.split(",")
    options.ranks = [int(rank) for rank in options.ranks.split(",")]
    options.overrides = [x for x in options.overrides.split(",") if x]
    return options


if __name__ == "__main__":
    main()
