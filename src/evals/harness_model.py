"""Stand in for the model that lm-evaluation-harness asks; our pass answers."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from unlora.data.chat_encoding import Encoded
from unlora.evals.eval_model import LazyModel
from unlora.evals.harness_silence import quiet
from unlora.evals.passes import score
from unlora.evals.progress import Bar
from unlora.evals.random_state import RandomStateApart
from unlora.evals.result_cache import Arrays, ResultCache
from unlora.forward import IGNORE_INDEX
from unlora.forward.modes import device_of, evaluating, unwrapped
from unlora.runs.hashes import digest

# lm-eval's name for a kind of request -> what we call the pass that answers it
PASSES = {
    "loglikelihood": "choices",
    "loglikelihood_rolling": "texts",
    "generate_until": "generate",
}
# raise the one of a pass that comes to answer something else than before
VERSIONS = {"choices": 1, "texts": 1, "generate": 2}


class Planned(Exception):
    """All requests are known, and nobody is to answer them."""


class HarnessModel:
    """Answers the requests of lm-eval: from the disk where they are kept, else from the model.

    What is kept is named by the model, the tokenizer, lm-eval's version and the very texts of the
    requests of a task: whatever changes one of these (data, examples that are shown, template,
    limit) is asked anew. What lm-eval makes of the answers is not kept.

    Args:
        batch_size: sequences at a time; None or auto: by the token budget alone.
        drawing: what a text that is drawn at random depends on, as seeds.
        kind: what the bar calls it.
        template_args: further arguments of the chat template.

    Attributes:
        lm: to hand to lm-eval. lm-eval's own pass would have every process answer everything, meet
            the vocabulary on whole prompts and take its logarithms in the dtype of the weights,
            where close choices tie.
        random_state: to be entered before lm-eval, which seeds.
    """

    def __init__(
        self,
        subject: LazyModel,
        tokenizer: PreTrainedTokenizerBase,
        cache: ResultCache,
        *,
        batch_size: int | str | None,
        drawing: Any,
        kind: str,
        bar: Bar,
        template_args: Mapping[str, Any],
    ):
        self.subject, self.tokenizer, self.cache = subject, tokenizer, cache
        self.batch_size, self.drawing, self.kind, self.bar = batch_size, drawing, kind, bar
        self.lm = _without_model(tokenizer, batch_size, template_args)
        self.random_state = RandomStateApart()
        self.theirs = {request: getattr(self.lm, request) for request in PASSES}
        self.answer_with(self.answers)

    def answer_with(self, answers: Callable[[str, Sequence[Any]], list[Any]]) -> None:
        """Have lm-eval's requests answered by this: (kind of request, requests) -> answers."""
        for request in PASSES:
            setattr(self.lm, request, _answering(answers, request))

    def answers(self, request: str, instances: Sequence[Any]) -> list[Any]:
        """The answer to each request; those of all tasks go through the model together."""
        tasks = _by_task(instances)
        keys = {task: self.key(request, requests) for task, requests in tasks.items()}
        arrays_of = {task: self.cache.read(key) for task, key in keys.items()}
        new = [instance for task in tasks if arrays_of[task] is None for instance in tasks[task]]
        answered = iter(self._ask(request, new) if new else [])
        for task, requests in tasks.items():
            if arrays_of[task] is None:
                arrays = arrays_of[task] = _packed([next(answered) for _ in requests])
                self.cache.write(keys[task], arrays)
        answers = {task: iter(_unpacked(arrays)) for task, arrays in arrays_of.items()}
        return [next(answers[instance.task_name]) for instance in instances]

    def plan(self, instances: Sequence[Any]) -> list[dict[str, Any]]:
        """Of each task: pass, task, requests, tokens (none cut off), and whether it is kept."""
        planned = []
        for request in PASSES:
            tasks = _by_task(instance for instance in instances if instance.request_type == request)
            for task, requests in tasks.items():
                planned.append(
                    {
                        "pass": PASSES[request],
                        "data": task,
                        "rows": len(requests),
                        "tokens": self._num_tokens(request, requests),
                        "kept": self.cache.has(self.key(request, requests)),
                    }
                )
        return planned

    def key(self, request: str, instances: Sequence[Any]) -> str | None:
        """What the answers to the requests of a task are kept under; None: they are not kept."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if self.subject.key is None or backend is None:
            return None
        name = PASSES[request]
        tokenizer = [backend.to_str(), self.tokenizer.special_tokens_map,
                     self.tokenizer.model_max_length]  # fmt: skip
        return digest(
            VERSIONS[name], name, self.subject.key, metadata.version("lm-eval"),
            digest(tokenizer), [instance.args for instance in instances],
            self.drawing if name == "generate" else None,
        )  # fmt: skip

    def _ask(self, request: str, instances: Sequence[Any]) -> list[Any]:
        with self.random_state.as_before():
            model = unwrapped(self.subject.model)  # is loaded here if it is not there yet
        self.lm._model, self.lm._config, self.lm._device = model, model.config, device_of(model)
        if request == "loglikelihood":
            return self._choices(self._pairs(instances))
        tokens = self._num_tokens(request, instances)
        self.bar.expect(self.kind, tokens)
        self.lm._loglikelihood_tokens = lambda requests, **_: self._choices(
            [(before, after) for _, before, after in requests], shown=False
        )
        with evaluating(model):
            answers = self.theirs[request](list(instances), disable_tqdm=True)
        self.bar.done(PASSES[request], tokens)
        return answers

    def _choices(
        self, pairs: Sequence[tuple[list[int], list[int]]], *, shown: bool = True
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each choice after its question, and whether it is the greedy answer."""
        rows = [_row(before, choice, self.lm.max_length) for before, choice in pairs]
        if shown:
            self.bar.expect(self.kind, sum(len(row.input_ids) for row in rows))
        progress = partial(self.bar.done, "choices") if shown else lambda done: None
        records = score(
            self.lm._model,
            rows,
            [""] * len(rows),
            pad_id=self.tokenizer.pad_token_id,
            end_id=None,
            batch_size=self.batch_size if isinstance(self.batch_size, int) else None,
            progress=progress,
        )
        return [
            (float(record.logp.sum(dtype=np.float64)), bool(record.hit.all()))
            if len(record.logp)
            else (float("nan"), False)
            for record in records
        ]

    def _pairs(self, instances: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
        """Questions and choices as tokens."""
        self.lm._loglikelihood_tokens = lambda requests, **_: requests
        encoded = self.theirs["loglikelihood"](list(instances), disable_tqdm=True)
        return [(before, choice) for _, before, choice in encoded]

    def _num_tokens(self, request: str, instances: Sequence[Any]) -> int:
        if request == "loglikelihood":
            return sum(len(before) + len(choice) for before, choice in self._pairs(instances))
        read = sum(len(self.lm.tok_encode(instance.args[0])) for instance in instances)
        if request == "loglikelihood_rolling":
            return read
        most = self.lm.max_gen_toks
        return read + sum(instance.args[1].get("max_gen_toks", most) for instance in instances)


def _without_model(
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int | str | None,
    template_args: Mapping[str, Any],
) -> Any:
    """lm-eval's class for models of transformers, with a tokenizer and no model yet."""
    from lm_eval.models.huggingface import HFLM

    # it warns that a model which is not one it loads itself
    with quiet("lm_eval.models.huggingface", logging.ERROR):
        return HFLM(
            pretrained=SimpleNamespace(config=SimpleNamespace(), device=torch.device("cpu")),
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size or "auto",
            chat_template_args=dict(template_args),
        )


def _answering(answers: Callable[[str, Sequence[Any]], list[Any]], request: str) -> Any:
    return lambda instances, **_: answers(request, instances)


def _by_task(instances: Iterable[Any]) -> dict[str, list[Any]]:
    tasks: dict[str, list[Any]] = {}
    for instance in instances:
        tasks.setdefault(instance.task_name, []).append(instance)
    return tasks


def _packed(answers: Sequence[Any]) -> Arrays:
    return {"said": np.frombuffer(json.dumps(list(answers)).encode(), dtype=np.uint8)}


def _unpacked(arrays: Arrays | None) -> list[Any]:
    assert arrays is not None
    answers = json.loads(arrays["said"].tobytes())
    return [tuple(answer) if isinstance(answer, list) else answer for answer in answers]


def _row(before: list[int], choice: list[int], most: int) -> Encoded:
    """A choice after its question, the question cut on the left to what the model can read."""
    ids = [*before, *choice][-(most + 1) :]  # the last token is predicted, not read
    start = max(1, len(ids) - len(choice))
    return Encoded(ids, [IGNORE_INDEX] * start + ids[start:])
