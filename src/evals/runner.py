"""Answers to the questions of a suite: from the disk where they are kept, else from the model."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from unlora.data.chat import Encoded
from unlora.evals import passes
from unlora.evals.datasets import Source
from unlora.evals.eval_model import Subject
from unlora.evals.plan import AFTER, Question
from unlora.evals.records import Generated, GradientNorms, Legible, Scored, States
from unlora.evals.result_cache import Arrays, Kept, digest

# raise the one of a pass that comes to answer something else than before; its answers are asked
# again, those of the others are kept (score, score_root and reread are one function)
VERSIONS = {
    "score": 1,
    "score_root": 1,
    "generate": 2,
    "reread": 1,
    "legible": 1,
    "gradient_norm": 1,
    "hidden": 1,
    "hidden_root": 1,
}
OF_ROOT = ("score_root", "hidden_root", "reread")
Progress = Callable[[str, int], Any]


@dataclass(frozen=True)
class Settings:
    """What a suite sets for its passes.

    Attributes:
        batch_size, tokens: limits of a batch; they change no answer.
        max_new_tokens: where the data do not say.
        gradient_modules: see :func:`unlora.evals.passes.gradient_norm`.
        classifier, label: see :func:`unlora.evals.passes.legible`.
    """

    max_new_tokens: int = 200
    batch_size: int | None = None
    tokens: int | None = None
    gradient_modules: str | Sequence[str] = "all-linear"
    classifier: str | None = None
    label: str | None = None


class Questioner:
    """Asks one model about some rows of some data.

    Args:
        chosen: of each data set, the examples that are asked about.
        kept: where answers are kept.
        progress: told a pass and the number of tokens that it has done.
    """

    def __init__(
        self,
        subject: Subject,
        sources: Mapping[str, Source],
        chosen: Mapping[str, Sequence[int]],
        settings: Settings,
        kept: Kept,
        progress: Progress = lambda name, done: None,
    ):
        self.subject, self.sources, self.chosen = subject, sources, chosen
        self.settings, self.kept, self.progress = settings, kept, progress
        self.answers: dict[Question, Any] = {}
        self.cut: dict[Question, int] = {}

    def answer(self, questions: Iterable[Question]) -> dict[Question, Any]:
        """The records of every question; those of one pass go through the model together."""
        waiting = list(questions)
        for name in dict.fromkeys(name for name, _ in waiting):
            keys = {data: self.key(name, data) for asked, data in waiting if asked == name}
            found = {data: self.kept.read(key) for data, key in keys.items()}
            new = [data for data, arrays in found.items() if arrays is None]
            for data, answer in self._asked(name, new).items():
                self.kept.write(keys[data], answer)
                found[data] = answer
            for data, arrays in found.items():
                assert arrays is not None
                self.answers[name, data] = self._records(name, data, arrays)
                self.cut[name, data] = int(arrays["cut"])
        return self.answers

    def new(self, questions: Sequence[Question]) -> list[Question]:
        """The questions that the model must be asked, as far as that is known."""
        first = [
            (name, data)
            for name, data in questions
            if name not in AFTER and not self.kept.has(self.key(name, data))
        ]
        return first + [(n, data) for n, data in questions if (AFTER.get(n), data) in first]

    def num_cut(self, questions: Iterable[Question]) -> int:
        """How many examples of the data of these questions were cut to their maximal length."""
        cut = {data: self.cut.get((name, data), 0) for name, data in questions}
        return sum(cut.values())

    def key(self, name: str, data: str) -> str | None:
        """What the answer to a question is kept under; None where it is not kept.

        A classifier on the hub is looked up for it.
        """
        model = self.subject.root_key if name in OF_ROOT else self.subject.key
        if model is None:
            return None
        if name == "legible" and self._classifier is None:
            return None
        version, told = VERSIONS[name], self._said_to(name, data)
        return digest(version, name, model, self._setting(name, data), told)

    def num_tokens(self, name: str, data: str) -> int:
        """Tokens that a question sends through the model, as if nothing was shared."""
        rows, source = self.chosen[data], self.sources[data]
        if name in ("generate", "reread"):
            most = self._max_new_tokens(data)
            return sum(len(source.prompts[i]) + most for i in rows)
        if name == "legible":
            return len(rows)
        return sum(len(row.input_ids) for row in self._flat(data))

    # --- what is asked ---------------------------------------------------------------------------

    def _flat(self, data: str) -> list[Encoded]:
        return [answer for i in self.chosen[data] for answer in self.sources[data].answers[i]]

    def _reread(self, data: str) -> list[Encoded]:
        """What was generated, as if it were the answer."""
        source, said = self.sources[data], self.answers["generate", data]
        texts = zip(self.chosen[data], said, strict=True)
        return source.encode([(i, one.text or "") for i, one in texts])

    def _said_to(self, name: str, data: str) -> Any:
        """All that the answer depends on beside the model, in short."""
        told = self.sources[data].fingerprint(self.chosen[data])
        if name in AFTER:
            return [told, digest([said.text for said in self.answers["generate", data]])]
        return told

    def _setting(self, name: str, data: str) -> Any:
        source, settings = self.sources[data], self.settings
        if name == "generate":
            ends = [*self._end_ids(data)]
            return [self._max_new_tokens(data), ends, list(source.stop)]
        if name == "legible":
            return [self._classifier, settings.label]
        return settings.gradient_modules if name == "gradient_norm" else None

    @cached_property
    def _classifier(self) -> str | None:
        return passes.identity_of(str(self.settings.classifier))

    def _max_new_tokens(self, data: str) -> int:
        return self.sources[data].config.get("max_new_tokens", self.settings.max_new_tokens)

    def _end_ids(self, data: str) -> list[int]:
        chat = self.sources[data].chat
        return sorted({chat.end_id, chat.tokenizer.eos_token_id} - {None})

    # --- the passes ------------------------------------------------------------------------------

    def _asked(self, name: str, data: Sequence[str]) -> dict[str, Arrays]:
        """New answers, as they are kept."""
        if not data:
            return {}
        if name == "generate":
            return self._generated(data)
        if name == "legible":
            return self._legible(data)
        rows = {one: self._reread(one) if name == "reread" else self._flat(one) for one in data}
        joined = [row for one in data for row in rows[one]]
        if name in OF_ROOT:
            with self.subject.as_root() as root:
                found = self._of_rows(name, root, joined)
        else:
            found = self._of_rows(name, self.subject.model, joined)
        remaining = iter(found)
        return {
            one: _packed(name, [next(remaining) for _ in rows[one]])
            | {"cut": self._num_cut(one), "texts": self._texts(name, one)}
            for one in data
        }

    def _of_rows(self, name: str, model: Any, rows: Sequence[Encoded]) -> Sequence[Any]:
        chat = next(iter(self.sources.values())).chat
        common = self._common(name) | {"pad_id": chat.tokenizer.pad_token_id}
        if name == "gradient_norm":
            modules = self.settings.gradient_modules
            return passes.gradient_norm(model, rows, modules=modules, **common)
        if name.startswith("hidden"):
            return passes.hidden(model, rows, **common)
        return passes.score(model, rows, [""] * len(rows), end_id=chat.end_id, **common)

    def _common(self, name: str) -> dict[str, Any]:
        return {
            "batch_size": self.settings.batch_size,
            "tokens": self.settings.tokens,
            "progress": lambda done: self.progress(name, done),
        }

    def _generated(self, data: Sequence[str]) -> dict[str, Arrays]:
        found = {}
        alike: dict[tuple, list[str]] = {}
        for one in data:
            alike.setdefault((self._max_new_tokens(one), *self.sources[one].stop), []).append(one)
        for (most, *stop), names in alike.items():
            prompts = [self.sources[one].prompts[i] for one in names for i in self.chosen[one]]
            chat = self.sources[names[0]].chat
            texts = iter(
                passes.generate(
                    self.subject.model, prompts, chat.tokenizer, end_ids=self._end_ids(names[0]),
                    max_new_tokens=most, stop=stop, answer_of=chat.without_thought,
                    **self._common("generate"),
                )
            )  # fmt: skip
            for one in names:
                said = [next(texts) for _ in self.chosen[one]]
                asked = [self.sources[one].prompt_texts[i] for i in self.chosen[one]]
                found[one] = {"said": _bytes(said), "asked": _bytes(asked)}
                found[one]["cut"] = np.array(
                    self.sources[one].num_cut(self.chosen[one], prompts=True)
                )
        return found

    def _legible(self, data: Sequence[str]) -> dict[str, Arrays]:
        assert self.settings.classifier is not None  # without one it is not asked
        texts = {one: [said.text for said in self.answers["generate", one]] for one in data}
        found = passes.legible(
            self.settings.classifier, [text for one in data for text in texts[one]],
            label=self.settings.label, **self._common("legible"),
        )  # fmt: skip
        p = iter(found)
        return {
            one: {"value": np.array([next(p) for _ in texts[one]]), "cut": np.array(0)}
            for one in data
        }

    def _records(self, name: str, data: str, arrays: Arrays) -> Any:
        """What a metric sees, from what is kept."""
        source, rows = self.sources[data], self.chosen[data]
        if name == "generate":
            asked, said = (json.loads(arrays[column].tobytes()) for column in ("asked", "said"))
            return [
                Generated(prompt, source.references[i], _cut(text, source.stop))
                for i, prompt, text in zip(rows, asked, said, strict=True)
            ]
        if name in ("gradient_norm", "legible"):
            kind = GradientNorms if name == "gradient_norm" else Legible
            return kind(arrays["value"].tolist())
        if name.startswith("hidden"):
            return States(list(arrays["value"]))
        flat = iter(_unpacked(arrays, json.loads(arrays["texts"].tobytes())))
        if name == "reread":
            said = self.answers["generate", data]
            return [
                one if text.text is not None else None for one, text in zip(flat, said, strict=True)
            ]
        if name == "score" and source.several:
            return [[next(flat) for _ in source.answers_of(i)] for i in rows]
        return list(flat)

    def _num_cut(self, data: str) -> np.ndarray:
        return np.array(self.sources[data].num_cut(self.chosen[data]))

    def _texts(self, name: str, data: str) -> np.ndarray:
        """The scored text of each row."""
        if name == "reread":
            return _bytes([said.text or "" for said in self.answers["generate", data]])
        return _bytes([text for i in self.chosen[data] for text in self.sources[data].texts[i]])


def _bytes(texts: Sequence[str | None]) -> np.ndarray:
    return np.frombuffer(json.dumps(texts).encode(), dtype=np.uint8)


def _packed(name: str, found: Sequence[Any]) -> Arrays:
    """Records of a pass over rows, as arrays."""
    if name not in ("score", "score_root", "reread"):
        return {"value": np.array(found)}
    if not found:  # an example may have no answers, and so may all of them
        return {"lengths": np.zeros(0, dtype=np.int64)}
    columns = {
        column: np.concatenate([getattr(one, column) for one in found])
        for column in ("logp", "hit", "mean", "var")
    }
    return columns | {
        "lengths": np.array([len(one.logp) for one in found]),
        "ended": np.array([one.ended for one in found]),
    }


def _unpacked(arrays: Arrays, texts: Sequence[str]) -> list[Scored]:
    if not len(arrays["lengths"]):
        return []
    ends = np.cumsum(arrays["lengths"])[:-1]
    columns = [np.split(arrays[column], ends) for column in ("logp", "hit", "mean", "var")]
    return [
        Scored(logp, hit, mean, var, text, bool(ended))
        for logp, hit, mean, var, text, ended in zip(*columns, texts, arrays["ended"], strict=True)
    ]


def _cut(text: str | None, stop: Iterable[str]) -> str | None:
    if text is None:
        return None
    for string in stop:
        text = text.split(string)[0]
    return text.strip()
