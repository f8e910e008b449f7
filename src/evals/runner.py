"""Answer the questions of a suite: from the cache where the answers are, else from the model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from unlora.evals.datasets import Source
from unlora.evals.eval_model import LazyModel
from unlora.evals.pass_plan import Question
from unlora.evals.passes.declaration import NOT_CACHED, PASSES, Arrays, PassInput, Settings
from unlora.evals.result_cache import ResultCache, digest

Progress = Callable[[str, int], Any]


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
        self.answers: dict[Question, Any] = {}
        self.cut: dict[Question, int] = {}
        self._settings: dict[Question, Any] = {}

    def answer(self, questions: Iterable[Question]) -> dict[Question, Any]:
        """The records of every question; those of one pass go through the model together."""
        waiting = list(questions)
        for name in dict.fromkeys(name for name, _ in waiting):
            keys = {data: self.key(name, data) for pass_name, data in waiting if pass_name == name}
            answers = {data: self.cache.read(key) for data, key in keys.items()}
            new = [data for data, arrays in answers.items() if arrays is None]
            for data, arrays in self._run(name, new).items():
                self.cache.write(keys[data], arrays)
                answers[data] = arrays
            for data, answer in answers.items():
                assert answer is not None
                self.answers[name, data] = PASSES[name].unpack(answer, self._input(name, data))
                self.cut[name, data] = int(answer["cut"])
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
            self._settings[name, data] = PASSES[name].setting(self._input(name, data))
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
            return sum(len(prompt) + rows.max_new_tokens for prompt in rows.prompts)
        return sum(len(answer.input_ids) for answer in rows.answers)

    def _input(self, name: str, data: str) -> PassInput:
        after = PASSES[name].after
        generated = self.answers[after, data] if after else None
        rows, scored = self.chosen[data], self.answers.get(("score", data), [])
        each = [record if isinstance(record, list) else [record] for record in scored]
        # without a single answer in the data there is no record either
        known = each if len(each) == len(rows) else None
        return PassInput(self.sources[data], rows, self.settings, generated, known)

    def _content(self, name: str, data: str) -> Any:
        """Hash of the data that the answer depends on, and of the answers that the pass reads."""
        rows = self.sources[data].fingerprint(self.chosen[data])
        if after := PASSES[name].after:
            return [rows, digest([answer.text for answer in self.answers[after, data]])]
        return rows

    def _run(self, name: str, data: Sequence[str]) -> dict[str, Arrays]:
        """New answers, as they are cached."""
        if not data:
            return {}
        pass_, inputs = PASSES[name], [self._input(name, source) for source in data]
        limits = {
            "batch_size": self.settings.batch_size,
            "tokens": self.settings.tokens,
            "progress": lambda done: self.progress(name, done),
        }
        if pass_.model == "root":
            with self.model.as_root() as root:
                results = pass_.run(root, inputs, **limits)
        else:
            model = None if pass_.model == "none" else self.model.model
            results = pass_.run(model, inputs, **limits)
        packed = map(pass_.pack, results, inputs)
        return dict(zip(data, packed, strict=True))
