"""Answer the questions of a suite: from the cache where the answers are, else from the model."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from unlora.evals.datasets import Source
from unlora.evals.eval_model import LazyModel
from unlora.evals.pass_plan import Question
from unlora.evals.passes.batching import found_budget
from unlora.evals.passes.declaration import (
    NOT_CACHED,
    PASSES,
    Arrays,
    Pass,
    PassInput,
    Settings,
    concatenated,
)
from unlora.evals.result_cache import ResultCache
from unlora.evals.spool import Spool, Stored
from unlora.forward.modes import device_of
from unlora.runs.hashes import digest

Progress = Callable[[str, int], Any]
# answers are in memory while so many batches are asked; processes that share them out need more,
# and their number must not change what goes together
BATCHES_ON_CPU, BATCHES_ON_GPU = 4, 64


class Answers(Mapping[Question, Any]):
    """The records of each question, in a temporary file; they are made when they are asked for.

    It knows nothing of who asks, so that both go, with their files, as soon as nobody needs them.

    Args:
        chosen: of each data set, the examples that are asked about.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        chosen: Mapping[str, Sequence[int]],
        settings: Settings,
    ):
        self._sources, self._chosen, self._settings = sources, chosen, settings
        self._spool = Spool()
        self._stored: dict[Question, Stored] = {}

    def input_of(self, name: str, data: str) -> PassInput:
        """What the answer to a question is read of."""
        after = PASSES[name].after
        generated = self[after, data] if after else None
        return PassInput(self._sources[data], self._chosen[data], self._settings, generated)

    def add(self, question: Question, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep an answer as it is cached."""
        self._stored[question] = self._spool.add(arrays)

    def __getitem__(self, question: Question) -> Any:
        arrays = self._spool.read(self._stored[question])
        return PASSES[question[0]].unpack(arrays, self.input_of(*question))

    def __iter__(self) -> Iterator[Question]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


class PassRunner:
    """Asks one model about some rows of some data.

    Args:
        chosen: of each data set, the examples that are asked about.
        cache: where answers are kept.
        progress: told a pass and the number of tokens that it has done.
    """

    def __init__(
        self,
        model: LazyModel,
        sources: Mapping[str, Source],
        chosen: Mapping[str, Sequence[int]],
        settings: Settings,
        cache: ResultCache,
        progress: Progress = lambda name, done: None,
    ):
        self.model, self.sources, self.chosen = model, sources, chosen
        self.settings, self.cache, self.progress = settings, cache, progress
        self.answers = Answers(sources, chosen, settings)
        self.cut: dict[Question, int] = {}
        self._settings: dict[Question, Any] = {}
        self._parts = Spool()

    def answer(self, questions: Iterable[Question]) -> Mapping[Question, Any]:
        """The records of every question; those of one pass go through the model together."""
        waiting = list(questions)
        for name in dict.fromkeys(name for name, _ in waiting):
            keys = {data: self.key(name, data) for pass_name, data in waiting if pass_name == name}
            new = []
            for data, key in keys.items():
                arrays = self.cache.read(key)
                if arrays is None:
                    new.append(data)
                else:
                    self._keep((name, data), arrays)
            for data, parts in self._run(name, new).items():
                arrays = concatenated([self._parts.read(part) for part in parts])
                self.cache.write(keys[data], arrays)
                self._keep((name, data), arrays)
        return self.answers

    def new(self, questions: Sequence[Question]) -> list[Question]:
        """The questions that the model must be asked, as far as that is known."""
        first = [
            (name, data)
            for name, data in questions
            if not PASSES[name].after and not self.cache.has(self.key(name, data))
        ]
        return first + [(n, data) for n, data in questions if (PASSES[n].after, data) in first]

    def num_cut(self, questions: Iterable[Question]) -> int:
        """How many examples of the data of these questions were cut to their maximal length."""
        cut = {data: self.cut.get((name, data), 0) for name, data in questions}
        return sum(cut.values())

    def key(self, name: str, data: str) -> str | None:
        """What the answer to a question is kept under; None where it is not kept.

        A classifier on the hub is looked up for it.
        """
        model = self.model.root_key if PASSES[name].model == "root" else self.model.key
        if model is None:
            return None
        if (name, data) not in self._settings:
            self._settings[name, data] = PASSES[name].setting(self.answers.input_of(name, data))
        setting = self._settings[name, data]
        if setting is NOT_CACHED:
            return None
        return digest(PASSES[name].version, name, model, setting, self._content(name, data))

    def num_tokens(self, name: str, data: str) -> int:
        """Tokens that a question sends through the model, as if nothing was shared."""
        pass_, rows = PASSES[name], PassInput(self.sources[data], self.chosen[data], self.settings)
        if pass_.model == "none":
            return len(rows.rows)
        if pass_.reads == "prompts":
            prompts = self.sources[data].cut_prompts.tokens[[*rows.rows]]
            return int(prompts.sum()) + len(prompts) * rows.max_new_tokens
        return int(self.sources[data].answers.tokens[[*rows.rows]].sum())

    def _keep(self, question: Question, arrays: Arrays) -> None:
        self.answers.add(question, arrays)
        self.cut[question] = int(arrays["cut"])

    def _with_scores(self, question: PassInput) -> PassInput:
        """The same with what the model is known to say to the answers."""
        scored = self.answers.get(("score", question.source.name), [])
        each = [record if isinstance(record, list) else [record] for record in scored]
        # without a single answer in the data there is no record either
        return replace(question, scored=each) if len(each) == len(question.rows) else question

    def _content(self, name: str, data: str) -> Any:
        """Hash of the data that the answer depends on, and of the answers that the pass reads."""
        rows = self.sources[data].fingerprint(self.chosen[data])
        if after := PASSES[name].after:
            return [rows, digest([answer.text for answer in self.answers[after, data]])]
        return rows

    def _run(self, name: str, data: Sequence[str]) -> dict[str, list[Stored]]:
        """New answers, as they are cached, in parts of some rows each."""
        if not data:
            return {}
        pass_ = PASSES[name]
        parts: dict[str, list[Stored]] = {source: [] for source in data}
        limits = {
            "batch_size": self.settings.batch_size,
            "tokens": self.settings.tokens,
            "progress": lambda done: self.progress(name, done),
        }
        with self._asked(pass_) as model:
            for inputs in self._blocks(pass_, data, model):
                results = pass_.run(model, [*inputs.values()], **limits)
                for (source, rows), result in zip(inputs.items(), results, strict=True):
                    parts[source].append(self._parts.add(_packed(pass_, result, rows)))
        return parts

    def _asked(self, pass_: Pass) -> Any:
        if pass_.model == "root":
            return self.model.as_root()
        return nullcontext(None if pass_.model == "none" else self.model.model)

    def _blocks(
        self, pass_: Pass, data: Sequence[str], model: Any
    ) -> Iterator[dict[str, PassInput]]:
        """The inputs of a pass; answers, of which there may be many, some examples at a time.

        Examples of the same number in several data sets stay together: they may begin alike. What
        is written goes on from one row to the next, so there are no parts of it.
        """
        inputs = {source: self.answers.input_of(pass_.name, source) for source in data}
        if pass_.model == "none":
            yield inputs
            return
        if pass_.reads == "prompts":
            yield {source: self._with_scores(rows) for source, rows in inputs.items()}
            return
        most = self.settings.tokens or found_budget(model)
        sizes = [rows.source.answers.own[[*rows.rows]] for rows in inputs.values()]
        batches = BATCHES_ON_CPU if device_of(model).type == "cpu" else BATCHES_ON_GPU
        for begin, end in _bounds(sizes, batches * most):
            some = {
                source: replace(rows, rows=rows.rows[begin:end]) for source, rows in inputs.items()
            }
            yield {
                source: rows for source, rows in some.items() if rows.rows or not begin
            }  # fmt: skip


def _packed(pass_: Pass, result: Any, rows: PassInput) -> Arrays:
    """The cached answer, with ``cut``: where the pass does not say it, of what it reads."""
    arrays = pass_.pack(result, rows)
    if "cut" in arrays:
        return arrays
    cut = rows.source.num_cut(rows.rows, prompts=pass_.reads == "prompts")
    return arrays | {"cut": np.array(cut)}


def _bounds(sizes: Sequence[np.ndarray], most: int) -> list[tuple[int, int]]:
    """First and last number of the examples of each block.

    Args:
        sizes: of each data set, the tokens of its examples.
        most: tokens of a block, but for its last example.
    """
    total = np.zeros(max(map(len, sizes)), dtype=np.int64)
    for of_source in sizes:
        total[: len(of_source)] += of_source
    block = (np.cumsum(total) - total) // most
    ends = [*(np.flatnonzero(np.diff(block)) + 1).tolist(), len(total)]
    return list(zip([0, *ends[:-1]], ends, strict=True))
