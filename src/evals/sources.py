"""The data that a suite asks about: rows as answers to score and prompts to continue."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from unlora.data.chat import STAND_IN, Chat, Encoded, encode_text
from unlora.data.rows import load_rows
from unlora.errors import InputError
from unlora.outputs import IGNORE_INDEX
from unlora.registry import unknown

KEYS = {
    "QADataset": (
        "hf_args",
        "question_key",
        "answer_key",
        "few_shot_dataset_hf_args",
        "max_length",
        "max_new_tokens",
        "stop",
    ),
    "CompletionDataset": (
        "hf_args", "prefix_key", "text_key", "max_length", "max_new_tokens", "stop"
    ),
}  # fmt: skip


class Source:
    """One data set of a suite, tokenised once.

    Args:
        config: ``handler`` and its arguments. ``QADataset`` asks ``question_key`` in the model's
            template, after the rows of ``few_shot_dataset_hf_args``; its ``answer_key`` may hold
            a list of answers. ``CompletionDataset`` is plain text in ``text_key``, that continues
            ``prefix_key`` where given.
        load: ``hf_args`` -> rows.
    """

    def __init__(
        self, name: str, config: Mapping[str, Any], chat: Chat, load: Callable[..., list[dict]]
    ):
        self.name, self.chat = name, chat
        self.config = {key: value for key, value in config.items() if value is not None}
        self.is_qa = config["handler"] == "QADataset"
        self.rows = load(**self.config["hf_args"])
        if not self.rows:
            raise InputError("There are no rows.")
        few_shot = self.config.get("few_shot_dataset_hf_args")
        self.shown = load(**few_shot) if few_shot else []

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> list[str]:
        """The columns it reads."""
        keys = ("question_key", "answer_key") if self.is_qa else ("prefix_key", "text_key")
        return [self.config[key] for key in keys if key in self.config]

    @property
    def absent(self) -> list[str]:
        """The columns that it reads and does not have."""
        return [key for key in self.columns if any(key not in row for row in self.rows)]

    @property
    def several(self) -> bool:
        """Whether an example has several answers."""
        return isinstance(self.rows[0][self.columns[-1]], (list, tuple))

    @property
    def stop(self) -> Sequence[str]:
        """A generation ends before the first of these."""
        return self.config.get("stop", ())

    @cached_property
    def answers(self) -> list[list[Encoded]]:
        """The answers of each example as tokens; one that is empty has no scored token."""
        return [[self._encode(row, answer) for answer in _several(answer)]
                for row, answer in self._pairs()]  # fmt: skip

    @cached_property
    def texts(self) -> list[list[str]]:
        """The scored part of each answer as text."""
        flat = [row for rows in self.answers for row in rows]
        ids = [[label for label in row.labels if label != IGNORE_INDEX] for row in flat]
        found = iter(
            self.chat.tokenizer.batch_decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
        return [[next(found) for _ in rows] for rows in self.answers]

    @cached_property
    def prompts(self) -> list[list[int]]:
        """What generation continues: what is before the first answer where that is scored.

        A tokenizer may treat a letter, a digit and a quote at the border differently, so only the
        scored row itself knows its prompt.
        """
        if not self.is_qa and "prefix_key" not in self.config:
            raise InputError(f"Data set {self.name}: generation continues a prefix_key; give one.")
        found = [
            answers[0] if answers and answers[0].input_ids else self._encode(row, STAND_IN)
            for row, answers in zip(self.rows, self.answers, strict=True)
        ]
        return [row.input_ids[: row.prompt_length] for row in found]

    def num_cut(self, examples: Iterable[int]) -> int:
        """How many of these examples have an answer or a prompt that was cut to ``max_length``."""
        return sum(any(answer.cut for answer in self.answers[i]) for i in examples)

    @cached_property
    def prompt_texts(self) -> list[str]:
        """The prompts without special tokens, for the log."""
        return self.chat.tokenizer.batch_decode(
            self.prompts, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    @cached_property
    def references(self) -> list[str]:
        """What should come after the prompts; of several answers the first."""
        return [_several(answer)[0].strip() for _, answer in self._pairs()]

    @cached_property
    def _examples(self) -> list[tuple[str, str]]:
        question, answer = self.columns
        return [(str(row[question]), str(row[answer])) for row in self.shown]

    def _pairs(self) -> list[tuple[dict, Any]]:
        return [(row, row[self.columns[-1]]) for row in self.rows]

    def _encode(self, row: dict, answer: str) -> Encoded:
        if not answer.strip():
            return Encoded([], [])
        if self.is_qa:
            length = self.config.get("max_length", 512)
            question = str(row[self.config["question_key"]])
            return self.chat.encode(question, answer, max_length=length, examples=self._examples)
        prefix = str(row[self.config["prefix_key"]]) if "prefix_key" in self.config else ""
        length = self.config.get("max_length", 2048)
        if prefix and not prefix[-1].isspace() and not answer[0].isspace():
            answer = " " + answer  # the benchmark cut the text between two words
        return encode_text(self.chat.tokenizer, answer, max_length=length, prefix=prefix)


class ReadRows:
    """Reads each split once, however many data sets of a suite use it."""

    def __init__(self, datasets_dir: str | None):
        self.datasets_dir = datasets_dir
        self.known: dict[str, list[dict[str, Any]]] = {}

    def __call__(self, **hf_args: Any) -> list[dict[str, Any]]:
        key = json.dumps(hf_args, sort_keys=True)
        if key not in self.known:
            self.known[key] = load_rows(**hf_args, datasets_dir=self.datasets_dir)
        return self.known[key]


def check_source(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a declaration of a data set that cannot be read.

    Raises:
        InputError: an unknown handler or key, or a key that is missing.
    """
    handler = config.get("handler")
    if handler not in KEYS:
        raise InputError(f"Data set {name}: {unknown('handler', handler, KEYS)}")
    for key in config:
        if key not in ("handler", *KEYS[handler]):
            raise InputError(f"Data set {name}: {unknown('key', key, KEYS[handler])}")
    wanted = ("hf_args", "question_key", "answer_key") if handler == "QADataset" else (
        "hf_args", "text_key"
    )  # fmt: skip
    for key in wanted:
        if not config.get(key):
            raise InputError(f"Data set {name}: {handler} needs {key}.")


def _several(answer: Any) -> list[str]:
    return [str(one) for one in answer] if isinstance(answer, (list, tuple)) else [str(answer)]
