"""Draw several texts after each prompt."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from unlora.evals.passes.batching import Progress
from unlora.evals.passes.declaration import (
    Arrays,
    Pass,
    PassInput,
    register,
    split,
    text_array,
    texts_of,
)
from unlora.evals.passes.generation import Sampling, before_stop, generate
from unlora.evals.records import Sampled, Samples

Draws = list[list[str | None]]


def _run(
    model: nn.Module, inputs: Sequence[PassInput], *, progress: Progress, **limits: Any
) -> list[Draws]:
    return [_drawn(model, data, progress=progress, **limits) for data in inputs]


def _drawn(model: nn.Module, data: PassInput, *, progress: Progress, **limits: Any) -> Draws:
    """The texts after each prompt; which they are depends on seed, row and number of the draw."""
    settings, chat, draws = data.settings, data.source.chat, range(data.settings.samples)
    keys = [(settings.sample_seed, row, draw) for row in data.rows for draw in draws]
    texts = generate(
        model,
        [prompt for prompt in data.prompts for _ in draws],
        chat.tokenizer,
        end_ids=data.end_ids,
        max_new_tokens=data.max_new_tokens,
        stop=data.source.stop,
        sampling=Sampling(keys, settings.temperature, settings.top_p),
        answer_of=chat.without_thought,
        progress=lambda done: progress(done // len(draws)),  # a prompt counts once
        **limits,
    )
    return split(texts, [draws] * len(data.rows))


def _pack(drawn: Draws, data: PassInput) -> Arrays:
    texts_before = data.source.prompt_texts
    prompts = [texts_before[i] for i in data.rows]
    return {"drawn": text_array(drawn), "asked": text_array(prompts)}


def _unpack(arrays: Arrays, data: PassInput) -> Sampled:
    columns = zip(data.rows, texts_of(arrays["asked"]), texts_of(arrays["drawn"]), strict=True)
    return Sampled([
        Samples(
            prompt,
            data.source.references[i],
            tuple(before_stop(text, data.source.stop) for text in texts),
        )
        for i, prompt, texts in columns
    ])  # fmt: skip


def _setting(data: PassInput) -> list[Any]:
    drawn = data.settings.samples, data.settings.temperature, data.settings.top_p
    return [
        data.max_new_tokens, data.end_ids, list(data.source.stop), *drawn,
        data.settings.sample_seed,
    ]  # fmt: skip


register(
    Pass(
        "sample", version=1, order=9, record=Sampled, reads="prompts",
        run=_run, pack=_pack, unpack=_unpack, setting=_setting,
    )
)  # fmt: skip
