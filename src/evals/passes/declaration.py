"""Declare passes: who is asked about what, and how the answers are cached.

A pass is written and registered in one file of this package; the plan, the runner and the metrics
know it by what it declares here.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from unlora.data.chat_encoding import Encoded
from unlora.evals.datasets import Source
from unlora.evals.records import Generated, Scored
from unlora.registry import Registry

if TYPE_CHECKING:  # it asks whether weights are split, as passes do
    from unlora.evals.eval_model import LazyModel

Arrays = dict[str, np.ndarray]
Item = TypeVar("Item")
NOT_CACHED = object()  # a setting without a name to keep answers under


@dataclass(frozen=True)
class Settings:
    """What a suite sets for its passes.

    Attributes:
        batch_size, tokens: limits of a batch; they change no answer.
        max_new_tokens: where the data do not say.
        gradient_modules: see :func:`unlora.evals.passes.gradient_norm`.
        classifier, label: see :func:`unlora.evals.passes.fluency_prob`.
        samples, temperature, top_p, sample_seed: see :mod:`unlora.evals.passes.sampled`.
    """

    max_new_tokens: int = 200
    batch_size: int | None = None
    tokens: int | None = None
    gradient_modules: str | Sequence[str] = "all-linear"
    classifier: str | None = None
    label: str | None = None
    samples: int = 32
    temperature: float = 1.0
    top_p: float = 1.0
    sample_seed: int = 0


@dataclass(frozen=True)
class PassInput:
    """Some rows of one data set, as a pass reads them.

    Attributes:
        rows: the numbers of the examples.
        generated: what the model wrote on these rows, for a pass after ``generate``: the answers
            are those then.
        scored: of each row, what the model is known to say to its answers.
    """

    source: Source
    rows: Sequence[int]
    settings: Settings
    generated: Sequence[Generated] | None = None
    scored: Sequence[Sequence[Scored]] | None = None

    @property
    def answers(self) -> list[Encoded]:
        """Every answer of the rows as tokens."""
        if self.generated is not None:
            return self.source.encode(zip(self.rows, self.texts, strict=True))
        return [answer for i in self.rows for answer in self.source.answers[i]]

    @property
    def answers_each(self) -> list[list[Encoded]]:
        """The data's answers of each row as tokens."""
        return [self.source.answers[i] for i in self.rows]

    @property
    def texts(self) -> list[str]:
        """The text of every answer."""
        if self.generated is not None:
            return [answer.text or "" for answer in self.generated]
        return self.source.texts(self.rows)

    @property
    def facts(self) -> Arrays:
        """What is cached beside the results of answers: how many were cut, and their texts."""
        return {
            "cut": np.array(self.source.num_cut(self.rows)), "texts": text_array(self.texts)
        }  # fmt: skip

    @property
    def prompts(self) -> list[list[int]]:
        """The tokens that generation continues."""
        prompts = self.source.prompts
        return [prompts[i] for i in self.rows]

    @property
    def max_new_tokens(self) -> int:
        """How much is generated."""
        return self.source.config.get("max_new_tokens", self.settings.max_new_tokens)

    @property
    def end_ids(self) -> list[int]:
        """The tokens that end a generation."""
        chat = self.source.chat
        return sorted({chat.end_id, chat.tokenizer.eos_token_id} - {None})


@dataclass(frozen=True)
class Pass:
    """One way to question a model, run at most once per (model, data) in an evaluation.

    Attributes:
        name: in plans, and in the names of cached answers.
        version: raise it when the pass comes to answer something else: its cached answers are
            asked again, those of the others are kept.
        order: place among the passes of a plan.
        record: the type by which a metric asks for the answers.
        record_each: the type for several answers per row. Without it data with several answers
            per row are refused.
        run: (model, inputs, batch_size, tokens, progress) -> the result of each input.
        pack: (result, input) -> the arrays of the cached answer. ``cut``, the number of examples
            that were cut, is added for what the pass reads where it is not among them.
        unpack: (arrays, input) -> the records that a metric sees.
        model: which model answers: the evaluated one, its root (every adapter off), or none.
        reads: answers of the data, or prompts that are continued.
        after: the pass whose answers this one reads.
        setting: input -> all that the answer depends on beside model and data;
            :data:`NOT_CACHED` where that has no name.
        why_not: (suite, settings, model) -> why the pass cannot be run, where that is so.
    """

    name: str
    version: int
    order: int
    record: Any
    run: Callable[..., Sequence[Any]]
    pack: Callable[[Any, PassInput], Arrays]
    unpack: Callable[[Arrays, PassInput], Any]
    record_each: Any = None
    model: Literal["self", "root", "none"] = "self"
    reads: Literal["answers", "prompts"] = "answers"
    after: str | None = None
    setting: Callable[[PassInput], Any] = lambda data: None
    why_not: "Callable[[str, Settings, LazyModel | None], str | None]" = field(
        default=lambda suite, settings, model: None
    )

    @property
    def records(self) -> dict[Any, str]:
        """Type of a metric's input -> what the plan calls it."""
        each = {self.record_each: f"{self.name}_each"} if self.record_each else {}
        return {self.record: self.name, **each}


PASSES: Registry[Pass] = Registry("pass", __package__ or "")


def register(*passes: Pass) -> None:
    """Make passes known to plans and metrics."""
    for entry in passes:
        PASSES.add(entry.name, entry)


def record_kinds() -> dict[Any, str]:
    """Type of a metric's input -> what the plan calls it, of all passes."""
    return {record: kind for name in PASSES for record, kind in PASSES[name].records.items()}


def pass_of(kind: str) -> Pass | None:
    """The pass that answers an input of this kind; None where it is not asked of a model."""
    return next((PASSES[name] for name in PASSES if kind in PASSES[name].records.values()), None)


def joined(parts: Iterable[Iterable[Item]]) -> list[Item]:
    """The rows of several inputs in one list, to go through the model together."""
    return [item for part in parts for item in part]


def split(results: Iterable[Item], parts: Sequence[Sequence[Any]]) -> list[list[Item]]:
    """Results of joined rows, by input."""
    remaining = iter(results)
    return [[next(remaining) for _ in part] for part in parts]


def concatenated(parts: Sequence[Mapping[str, np.ndarray]]) -> Arrays:
    """The cached answer of all rows, from those of some rows each, in their order."""
    if len(parts) == 1:
        return dict(parts[0])
    names = dict.fromkeys(name for part in parts for name in part)
    by_name = {name: [part[name] for part in parts if name in part] for name in names}
    return {name: _joined(arrays) for name, arrays in by_name.items()}


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    if not arrays[0].ndim:
        return np.sum(arrays)  # a number of rows
    if arrays[0].dtype == np.uint8:
        return text_array(joined(map(texts_of, arrays)))
    return np.concatenate([array for array in arrays if len(array)] or arrays)


def text_array(texts: Sequence[Any]) -> np.ndarray:
    """Texts, or lists of them, as an array of bytes."""
    return np.frombuffer(json.dumps(texts).encode(), dtype=np.uint8)


def texts_of(array: np.ndarray) -> list[Any]:
    """The texts of :func:`text_array`."""
    return json.loads(array.tobytes())
