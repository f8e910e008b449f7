"""Average the hidden states of each layer over an answer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from unlora.data.chat_encoding import Encoded
from unlora.data.collate import collate
from unlora.evals.passes.batching import Budget, Progress, answer_all
from unlora.evals.passes.declaration import Arrays, Pass, PassInput, joined, register, split
from unlora.evals.records import RootStates, States
from unlora.forward import IGNORE_INDEX
from unlora.forward.architecture import output_embedding
from unlora.forward.modes import device_of, evaluating, unwrapped

OF_ALL_LAYERS = 0.25  # of the token budget: the states of every layer are kept for a moment


@torch.no_grad()
def hidden(
    model: nn.Module,
    rows: Sequence[Encoded],
    *,
    pad_id: int,
    batch_size: int | None = None,
    tokens: int | None = None,
    progress: Progress = lambda done: None,
) -> States:
    """Mean hidden state over the scored tokens of each row: [layers + 1, width], embedding first.

    NaN where no token is scored, or where the states are not finite.
    """
    lm = unwrapped(model)
    config = lm.config.get_text_config()
    shape = (config.num_hidden_layers + 1, config.hidden_size)
    with_answer = [i for i, row in enumerate(rows) if any(x != IGNORE_INDEX for x in row.labels)]

    def ask(batch: list[int]) -> list[Float[np.ndarray, "layers width"]]:
        inputs = {
            k: t.to(device_of(lm)) for k, t in collate([rows[i] for i in batch], pad_id).items()
        }
        scored = (inputs["labels"] != IGNORE_INDEX).double()
        handle = output_embedding(lm).register_forward_pre_hook(
            lambda _module, args: (args[0][:, :1], *args[1:])  # nobody asks for logits
        )
        try:
            outputs = lm(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                output_hidden_states=True, use_cache=False,
            ).hidden_states  # fmt: skip
        finally:
            handle.remove()
        means = [
            torch.einsum("rtw,rt->rw", states.double(), scored.to(states.device)).cpu()
            / scored.sum(1, keepdim=True).cpu()
            for states in outputs
        ]
        return list(torch.stack(means, dim=1).float().numpy())

    states = [np.full(shape, np.nan, dtype=np.float32) for _ in rows]
    with evaluating(lm):
        mean_states = answer_all(
            with_answer,
            [len(rows[i].input_ids) for i in with_answer],
            ask,
            lm,
            budget=Budget(tokens, batch_size),
            share=OF_ALL_LAYERS,
            progress=lambda done: progress(sum(len(rows[i].input_ids) for i in done)),
        )
    for i, state in zip(with_answer, mean_states, strict=True):
        states[i] = state if np.isfinite(state).all() else states[i]
    return States(states)


def _run(model: nn.Module, inputs: Sequence[PassInput], **limits: Any) -> list[list[np.ndarray]]:
    rows = [data.answers for data in inputs]
    pad_id = inputs[0].source.chat.tokenizer.pad_token_id
    return split(hidden(model, joined(rows), pad_id=pad_id, **limits), rows)


def _pack(states: Sequence[np.ndarray], data: PassInput) -> Arrays:
    return {"value": np.array(states)} | data.facts


def _unpack(arrays: Arrays, data: PassInput) -> States:
    return States(list(arrays["value"]))


register(
    Pass("hidden", version=1, order=3, record=States, run=_run, pack=_pack, unpack=_unpack),
    Pass(
        "hidden_root", version=1, order=4, record=RootStates, model="root",
        run=_run, pack=_pack, unpack=_unpack,
    ),
)  # fmt: skip
