"""Let one model read another's inner states of an answer: activation patching."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unlora.data.collate import collate
from unlora.data.encoded import Encoded
from unlora.evals.passes.batching import Budget, answer_all, found_budget
from unlora.evals.passes.loglikelihood import LOGITS_AT_ONCE
from unlora.forward import IGNORE_INDEX
from unlora.forward.architecture import decoder_layers
from unlora.forward.forward_pass import ask
from unlora.forward.modes import device_of, evaluating, in_full, unwrapped

Places = tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]]  # row, and position in it
States = Float[Tensor, "layers positions width"]


def answer_states(model: nn.Module, rows: Sequence[Encoded], pad_id: int) -> list[States]:
    """Hidden states behind every decoder layer, where a scored token is predicted.

    Float32, on the CPU; those of all the rows are held at once.
    """
    lm = unwrapped(model)

    def states_of(batch: list[int]) -> list[States]:
        inputs, places = _inputs([rows[i] for i in batch], pad_id, lm)
        seen: list[Tensor] = []
        with _each_layer(lm, lambda states, _: seen.append(in_full(states[places]).cpu())):
            ask(lm, inputs)
        lengths = torch.bincount(places[0], minlength=len(batch)).tolist()
        return list(torch.stack(seen).split(lengths, dim=1))

    return _in_batches(lm, rows, range(len(rows)), states_of)


def patched_logps(
    target: nn.Module, rows: Sequence[Encoded], states: Sequence[States], pad_id: int
) -> Float[np.ndarray, "layers rows"]:
    """Mean log-probability of each answer under the target with states that are not its own.

    At [layer, row] those behind this one layer are replaced, where a scored token is predicted:
    the target reads them with the layers above. NaN where no token is scored.

    Args:
        states: of each row, see :func:`answer_states`.
    """
    lm = unwrapped(target)
    scored = [i for i in range(len(rows)) if states[i].shape[1]]

    def logps_of(batch: list[int]) -> list[np.ndarray]:
        inputs, places = _inputs([rows[i] for i in batch], pad_id, lm)
        own = torch.cat([states[i] for i in batch], dim=1)
        means = []
        for number in range(len(own)):
            with _each_layer(lm, _replacing(number, places, own[number])):
                outputs = ask(lm, inputs)
            means.append(outputs.mean_by_row(outputs.token_logps).cpu().numpy())
        return list(np.stack(means, axis=1))

    logps = np.full((len(decoder_layers(lm)), len(rows)), np.nan)
    for i, means in zip(scored, _in_batches(lm, rows, scored, logps_of), strict=True):
        logps[:, i] = means
    return logps


def _replacing(number: int, places: Places, own: Tensor) -> Callable[[Tensor, int], Tensor | None]:
    def replaced(states: Tensor, layer: int) -> Tensor | None:
        return states.index_put(places, own.to(states)) if layer == number else None

    return replaced


@torch.no_grad()
def _in_batches(
    lm: Any, rows: Sequence[Encoded], indices: Sequence[int], ask_batch: Callable[[list[int]], list]
) -> list[Any]:
    """Answers about some rows, so many at a time that their logits fit into memory."""
    tokens = min(found_budget(lm), LOGITS_AT_ONCE // lm.config.get_text_config().vocab_size)
    sizes = [len(rows[i].input_ids) for i in indices]
    with evaluating(lm):
        return answer_all(indices, sizes, ask_batch, lm, budget=Budget(max(1, tokens)))


def _inputs(rows: Sequence[Encoded], pad_id: int, lm: Any) -> tuple[dict[str, Tensor], Places]:
    batch = {key: part.to(device_of(lm)) for key, part in collate(rows, pad_id).items()}
    row, position = (batch["labels"][:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    return batch, (row, position)


@contextmanager
def _each_layer(lm: nn.Module, look: Callable[[Tensor, int], Tensor | None]) -> Iterator[None]:
    """Show the hidden states behind every decoder layer; what is returned takes their place."""

    def hook(number: int) -> Callable[..., Any]:
        def shown(_module: nn.Module, _args: Any, output: Any) -> Any:
            states, *others = output if isinstance(output, tuple) else (output,)
            instead = look(states, number)
            if instead is None:
                return None
            return (instead, *others) if isinstance(output, tuple) else instead

        return shown

    with ExitStack() as stack:
        for number, layer in enumerate(decoder_layers(lm)):
            stack.callback(layer.register_forward_hook(hook(number)).remove)
        yield
