"""Read the data that a suite asks about: rows as answers to score and prompts to continue."""

import difflib
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from unlora.data.chat_encoding import Chat, Encoded, Example
from unlora.data.conversations import as_questions
from unlora.data.first_row import pieces
from unlora.data.qa import say_what_is_text, without_ends
from unlora.data.template import Turns
from unlora.data.text import encode_text, text_prompt
from unlora.errors import InputError
from unlora.evals.own import has_holes, not_given, whole, without_column
from unlora.evals.spool import TokenSpool
from unlora.forward import IGNORE_INDEX
from unlora.registry import unknown

OF_A_THOUGHT = 512  # tokens; fewer are rarely enough to think and to answer
logger = logging.getLogger(__name__)


class Source:
    """One data set of a suite, tokenised once.

    Args:
        config: ``handler`` and its arguments. ``QADataset`` asks ``question_key`` in the model's
            template, after the rows of ``few_shot_dataset_hf_args``; its ``answer_key`` may hold
            a list of answers, and ``question_format`` has words around the question, which stands
            at its ``{}``. ``CompletionDataset`` is plain text in ``text_key``, that continues
            ``prefix_key`` where given. ``where`` keeps the rows whose columns have these values:
            a value or a list of them, null for all. Data that a user brings may have holes:
            ``needed`` and ``optional`` map keys of this config to what the user can do where there
            is no such file or column. Without what is needed there is an error, without what is
            optional the data set is ``missing``; a row without a question or an answer has no
            scored token. ``several`` says that ``answer_key`` holds lists, whatever the file does.
        load: ``hf_args`` -> rows.

    Attributes:
        missing: why it cannot be asked about, where that is so.

    Raises:
        InputError: there are no rows, or none has a column that is needed.
    """

    def __init__(
        self, name: str, config: Mapping[str, Any], chat: Chat, load: Callable[..., list[dict]]
    ):
        self.name, self.chat = name, chat
        self.config = {key: value for key, value in config.items() if value is not None}
        self.is_qa = config["handler"] == "QADataset"
        self.rows: list[dict] = []
        self.shown: list[dict] = []
        self.missing = not_given(name, self.config)
        if self.missing:
            return
        rows = self._questions(load(**self.config["hf_args"]))
        if not rows:
            raise InputError("There are no rows.")
        self.missing = without_column(name, self.config, self._columns, rows)
        if self.missing:
            return
        rows = _rows_where(rows, self.config.get("where", {}))
        few_shot = self.config.get("few_shot_dataset_hf_args")
        shown = self._questions(load(**few_shot)) if few_shot else []
        if has_holes(self.config):
            several = bool(self.config.get("several"))
            rows = whole(rows, self.columns, several=several)
            shown = [row for row in whole(shown, self.columns) if row[self.columns[-1]]]
        self.rows = self._as_told(self._in_format(rows), name)
        self.shown = self._as_told(self._in_format(shown))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> list[str]:
        """The columns it reads."""
        return list(self._columns.values())

    @property
    def _columns(self) -> dict[str, str]:
        keys = ("question_key", "answer_key") if self.is_qa else ("prefix_key", "text_key")
        return {key: self.config[key] for key in keys if key in self.config}

    @property
    def absent(self) -> list[str]:
        """The columns that it reads and does not have."""
        rows = [*self.rows, *self.shown]
        return [key for key in self.columns if any(key not in row for row in rows)]

    @property
    def several(self) -> bool:
        """Whether an example has several answers."""
        return bool(self.config.get("several")) or isinstance(
            self.rows[0][self.columns[-1]], (list, tuple)
        )

    @property
    def stop(self) -> Sequence[str]:
        """A generation ends before the first of these."""
        return self.config.get("stop", ())

    def fingerprint(self, examples: Iterable[int]) -> str:
        """sha256 of what the model is told of these examples, before it is made into tokens."""
        told = {key: self.config.get(key) for key in ("handler", "max_length", "answer_key")}
        texts = [[self.rows[i][column] for column in self.columns] for i in examples]
        content = json.dumps([self.chat.fingerprint, told, self._examples, texts], default=str)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    @cached_property
    def answers(self) -> TokenSpool:
        """The answers of each example as tokens; one that is empty has no scored token."""
        pairs = [(row, text) for row, answer in self._pairs() for text in _several(answer)]
        encoded = self._encode_all(pairs)
        rows = TokenSpool([next(encoded) for _ in _several(answer)] for _, answer in self._pairs())
        if cut := int(rows.cut.sum()):
            logger.warning("%d of %d rows of %s cut to max_length", cut, len(rows), self.name)
        return rows

    def texts(self, examples: Iterable[int]) -> list[str]:
        """The scored part of each answer of these examples as text."""
        rows = (row for i in examples for row in self.answers[i])
        return self.chat.tokenizer.batch_decode(
            [[label for label in row.labels if label != IGNORE_INDEX] for row in rows],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )

    @cached_property
    def cut_prompts(self) -> TokenSpool:
        """What generation continues: the same whatever the answer is; see ``Chat.prompts``.

        Raises:
            InputError: the model reads less than is to be written.
        """
        if not self.is_qa and "prefix_key" not in self.config:
            raise InputError(f"Data set {self.name}: generation continues a prefix_key; give one.")
        reads = self.chat.tokenizer.model_max_length
        most = self.config.get("max_new_tokens", 0)
        if self.chat.template.thinks and most < OF_A_THOUGHT:
            raise InputError(
                f"The model is to think before it answers (enable_thinking), and max_new_tokens "
                f"is {most}: most answers would end within their thought. Set it, as in "
                f"eval.own.max_new_tokens, to 2048, or at least to {OF_A_THOUGHT}."
            )
        length = self.config.get("max_length", 512 if self.is_qa else 2048)
        rows = self._encode_prompts(min(length, max(reads - most, reads // 2)))
        prompts = TokenSpool([row] for row in rows)
        longest = int(prompts.tokens.max())
        if longest + most > reads:
            raise InputError(
                f"max_new_tokens is {most}, but the model reads {reads} tokens, prompt and answer "
                f"together, and the longest prompt of {self.name} has {longest}. Set it, as in "
                f"eval.own.max_new_tokens, to {reads - longest} or less."
            )
        if cut := int(prompts.cut.sum()):
            logger.warning("%d of %d prompts of %s cut", cut, len(prompts), self.name)
        return prompts

    @property
    def prompts(self) -> list[list[int]]:
        """The tokens that generation continues."""
        return [row.input_ids for [row] in self.cut_prompts]

    def _encode_prompts(self, room: int) -> list[Encoded]:
        if self.is_qa:
            questions = [_question(row[self.config["question_key"]]) for row in self.rows]
            return self.chat.prompts(questions, examples=self._examples, room=room)
        prefixes = [str(row[self.config["prefix_key"]]) for row in self.rows]
        return [text_prompt(self.chat.control, prefix, room=room) for prefix in prefixes]

    def first_row(self, *, prompts: bool) -> dict[str, list[str]]:
        """The first example as tokens, as a pass reads it: what is scored, or gone on from."""
        tokenizer = self.chat.tokenizer
        if prompts:
            return {"gone on from": pieces(tokenizer, self.cut_prompts[0][0])["read"]}
        scored = (row for answers in self.answers for row in answers if row.input_ids)
        return pieces(tokenizer, next(scored, Encoded([], [])))

    def num_cut(self, examples: Iterable[int], *, prompts: bool = False) -> int:
        """How many of these examples have an answer, or a prompt, that was cut."""
        rows = self.cut_prompts if prompts else self.answers
        return int(rows.cut[[*examples]].sum())

    @property
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
    def _examples(self) -> list[Example]:
        if not self.shown:
            return []
        question, answer = self.columns
        return [(_question(row[question]), str(row[answer])) for row in self.shown]

    def answers_of(self, example: int) -> list[str]:
        """The answers of an example as they stand in the data."""
        return _several(self.rows[example][self.columns[-1]])

    def encode(self, answers: Iterable[tuple[int, str]]) -> list[Encoded]:
        """Texts as if they were the answers of these examples."""
        return [*self._encode_all([(self.rows[example], text) for example, text in answers])]

    def _in_format(self, rows: Sequence[dict]) -> list[dict]:
        form, key = self.config.get("question_format"), self.config.get("question_key")
        if form is None:
            return list(rows)
        return [row | {key: _in_words(form, row[key])} if key in row else row for row in rows]

    def _questions(self, rows: Sequence[dict]) -> list[dict]:
        if not self.is_qa:
            return list(rows)
        question, answer = self.config["question_key"], self.config["answer_key"]
        return as_questions(rows, question, answer, of=self.name)

    def _as_told(self, rows: list[dict], of: str = "") -> list[dict]:
        """The rows with answers as they are told: without an end token of their own."""
        if not self.is_qa or any(key not in row for row in rows for key in self.columns):
            return rows
        question, answer = self.columns
        cells = [(_question(row[question]), _several(row[answer])) for row in rows]
        told = without_ends([text for _, several in cells for text in several], self.chat, of=of)
        prompts = [question for question, several in cells for _ in several]
        say_what_is_text(prompts, told, self.chat, of=of)
        remaining = iter(told)
        changed = [[next(remaining) for _ in several] for _, several in cells]
        return [
            row
            if now == before
            else row | {answer: now if isinstance(row[answer], (list, tuple)) else now[0]}
            for row, now, (_, before) in zip(rows, changed, cells, strict=True)
        ]

    def _pairs(self) -> list[tuple[dict, Any]]:
        return [(row, row[self.columns[-1]]) for row in self.rows]

    def _encode_all(self, pairs: Sequence[tuple[dict, str]]) -> Iterator[Encoded]:
        """Rows with one answer each as tokens; what is empty, or shown before, has none."""
        if not self.is_qa:
            yield from (self._encode_text(row, answer) for row, answer in pairs)
            return
        key = self.config["question_key"]
        texts = [(_question(row[key]), answer) for row, answer in pairs]
        # the answer of an example that is shown would stand in its own prompt
        present = [bool(pair[1].strip()) and pair not in self._examples for pair in texts]
        answered = self.chat.encode_each(
            [pair for pair, there in zip(texts, present, strict=True) if there],
            max_length=self.config.get("max_length", 512),
            examples=self._examples,
            of=self.name,
        )
        for there in present:
            yield next(answered) if there else Encoded([], [])

    def _encode_text(self, row: dict, answer: str) -> Encoded:
        if not answer.strip():
            return Encoded([], [])
        prefix = str(row[self.config["prefix_key"]]) if "prefix_key" in self.config else ""
        length = self.config.get("max_length", 2048)
        if prefix and not prefix[-1].isspace() and not answer[0].isspace():
            answer = " " + answer  # the benchmark cut the text between two words
        return encode_text(self.chat.control, answer, max_length=length, prefix=prefix)


def _rows_where(rows: Sequence[dict], where: Mapping[str, Any]) -> list[dict]:
    """The rows whose columns have these values.

    Raises:
        InputError: there is no such column, or no row that has one of the values.
    """
    left = list(rows)
    for column, wanted in where.items():
        if wanted is None:
            continue
        if any(column not in row for row in left):
            raise InputError(f"where: {unknown('column', column, left[0])}")
        there = dict.fromkeys(str(row[column]) for row in left)
        for value in _several(wanted):
            if value not in there:
                near = difflib.get_close_matches(value, there, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                some = ", ".join(list(there)[:5])
                raise InputError(
                    f"where: no row has {value!r} in its column {column!r}.{hint} "
                    f"Some of the {len(there)} values there: {some}."
                )
        left = [row for row in left if str(row[column]) in _several(wanted)]
    return left


def _question(cell: Any) -> str | Turns:
    return cell if isinstance(cell, Turns) else str(cell)


def _in_words(form: str, cell: Any) -> str | Turns:
    if isinstance(cell, Turns):
        return replace(cell, question=form.replace("{}", cell.question))
    return form.replace("{}", str(cell))


def _several(answer: Any) -> list[str]:
    if answer is None:
        return [""]
    return [str(text) for text in answer] if isinstance(answer, (list, tuple)) else [str(answer)]
