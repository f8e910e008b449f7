"""Questions and answers as tokens: which are read, which are scored.

    <|im_start|>user  Who wrote it? <|im_end|> <|im_start|>assistant   Ana  Silva <|im_end|>
    ------------------------------ prompt ------------------------   -------- scored -------

The answer and exactly one end token are scored. The border is found by character offsets of the
whole text, tokenised once, so a merge across the border hides no answer token.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from unlora.errors import InputError
from unlora.outputs import IGNORE_INDEX

OTHER_TEMPLATE = (
    "Use another tokenizer, or set model.template_args.apply_chat_template=false and give the "
    "*_tag strings."
)
AT_ONCE = 16  # texts that are tokenised together
STAND_IN = "A"  # answers begin with a letter; stands for the answer where only the prompt is wanted


@dataclass(frozen=True)
class Encoded:
    """One example as token ids.

    Attributes:
        labels: the ids again where a token is scored, ``IGNORE_INDEX`` elsewhere.
        cut: number of tokens that were dropped to keep within the maximal length.
        number: which row of its data set it is, from 0.
    """

    input_ids: list[int]
    labels: list[int]
    cut: int = 0
    number: int = 0

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first scored one."""
        return next(i for i, label in enumerate(self.labels) if label != IGNORE_INDEX)


@dataclass(frozen=True)
class Chat:
    """How one model is asked: its tokenizer and the ``template_args`` of its config.

    With ``apply_chat_template`` the tokenizer's own template is used, with ``system_prompt`` and
    ``date_string`` where given; otherwise the ``*_tag`` strings are put around question and answer.
    """

    tokenizer: PreTrainedTokenizerBase
    template_args: Mapping[str, object]

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise InputError(
                f"The tokenizer {self.tokenizer.name_or_path!r} has no fast version; answers are "
                "found by character offsets, which only fast tokenizers give. Convert it first."
            )
        if self.template_args.get("apply_chat_template") and not self.tokenizer.chat_template:
            raise InputError(
                f"apply_chat_template is true, but the tokenizer {self.tokenizer.name_or_path!r} "
                "has no chat template. Set model.template_args.apply_chat_template=false and give "
                "the *_tag strings, or use a tokenizer with a template."
            )
        if self._uses_template and STAND_IN * 8 not in self._prompt_text(STAND_IN * 8, ()):
            raise InputError(
                f"The chat template of the tokenizer {self.tokenizer.name_or_path!r} leaves out "
                f"what the user says. {OTHER_TEMPLATE}"
            )

    @cached_property
    def end_id(self) -> int:
        """The token that ends an answer in this template, e.g. ``<|im_end|>``."""
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        if self._uses_template:
            turns = self._messages("Q", (), answer=STAND_IN * 8)
            text = self._render(turns, add_generation_prompt=False)
            tail = text.rpartition(STAND_IN * 8)[2]
        else:
            tail = str(self.template_args.get("asst_end_tag") or "")
        for token in self.tokenizer(tail, add_special_tokens=False).input_ids:
            if token in special:
                return token
        if self.tokenizer.eos_token_id is None:
            raise InputError(
                f"The tokenizer {self.tokenizer.name_or_path!r} has no end-of-sequence token."
            )
        return self.tokenizer.eos_token_id

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all that decides how a text becomes tokens: tokenizer and template."""
        parts = (
            self.tokenizer.backend_tokenizer.to_str(),
            str(self.tokenizer.chat_template),
            json.dumps(dict(self.template_args), sort_keys=True, default=str),
            self._prompt_text("Q", ()),  # a template may write today's date
            str(self.end_id),
        )
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()

    def encode(
        self,
        question: str,
        answer: str,
        *,
        max_length: int = 512,
        examples: Sequence[tuple[str, str]] = (),
    ) -> Encoded:
        """Question and answer as tokens; the answer and one end token are scored.

        Args:
            max_length: in tokens, and never more than the model reads. A row that is longer loses
                the beginning of its prompt but for the begin token (the question stands at the end
                of it), down to half of the length, then the end of its answer, end token included.
            examples: (question, answer) pairs shown before the question.

        Raises:
            InputError: the answer is empty, so there is nothing to score.
        """
        return self.encode_all([(question, answer)], max_length=max_length, examples=examples)[0]

    def encode_all(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        max_length: int = 512,
        examples: Sequence[tuple[str, str]] = (),
    ) -> list[Encoded]:
        """:meth:`encode` of many questions and answers, which is faster than one by one."""
        for question, answer in pairs:
            if not answer.strip():
                raise InputError(
                    f"The answer to {question[:200]!r} is empty; there is nothing to score. Give "
                    "one, or leave the row out."
                )
        if not pairs:
            return []
        questions = dict.fromkeys(question for question, _ in pairs)
        prompts = {question: self._prompt_text(question, examples) for question in questions}
        room = min(max_length, self.tokenizer.model_max_length)
        eos, bos, end = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id, self.end_id
        encoded = []
        texts = [(prompts[question], answer) for question, answer in pairs]
        for prompt, found, places in self._tokens(texts):
            ids, offsets = list(found), list(places)
            while ids and ids[-1] == eos and offsets[-1][0] == offsets[-1][1]:
                ids.pop(), offsets.pop()  # some tokenizers end every text themselves
            if len(ids) > 1 and bos is not None and ids[0] == ids[1] == bos:
                ids, offsets = ids[1:], offsets[1:]  # the text brought its own
            start = next(i for i, (_, until) in enumerate(offsets) if until > len(prompt))
            encoded.append(_fit(ids[:start], [*ids[start:], end], room, bos))
        return encoded

    def _tokens(
        self, texts: Sequence[tuple[str, str]]
    ) -> Iterator[tuple[str, list[int], list[tuple[int, int]]]]:
        """Prompt, tokens and offsets of each prompt and answer.

        Some at a time, as offsets take more memory than all else; and one number is one object,
        so that a token is kept in 8 bytes.
        """
        one: dict[int, int] = {}
        for begin in range(0, len(texts), AT_ONCE):
            some = texts[begin : begin + AT_ONCE]
            encoding = self.tokenizer(
                [prompt + answer for prompt, answer in some],
                add_special_tokens=not self._uses_template,
                return_offsets_mapping=True,
                verbose=False,  # of rows that are too long, the number that is cut is said
            )
            for (prompt, _), ids, offsets in zip(
                some, encoding.input_ids, encoding.offset_mapping, strict=True
            ):
                yield prompt, [one.setdefault(token, token) for token in ids], offsets

    def prompt(self, question: str, *, examples: Sequence[tuple[str, str]] = ()) -> list[int]:
        """What generation continues: the unscored beginning of :meth:`encode`."""
        row = self.encode(question, STAND_IN, examples=examples, max_length=1 << 30)
        return row.input_ids[: row.prompt_length]

    @property
    def _uses_template(self) -> bool:
        return bool(self.template_args.get("apply_chat_template"))

    def _prompt_text(self, question: str, examples: Sequence[tuple[str, str]]) -> str:
        if self._uses_template:
            return self._render(self._messages(question, examples), add_generation_prompt=True)
        tag = {key: str(value or "") for key, value in self.template_args.items()}
        ask = lambda q: "".join(  # noqa: E731
            (tag.get("user_start_tag", ""), q, tag.get("user_end_tag", ""),
             tag.get("asst_start_tag", ""))
        )  # fmt: skip
        shown = "".join(ask(q) + a + tag.get("asst_end_tag", "") for q, a in examples)
        return tag.get("system_prompt_with_special_tokens", "") + shown + ask(question)

    def _messages(
        self, question: str, examples: Sequence[tuple[str, str]], answer: str | None = None
    ) -> list[dict[str, str]]:
        system = self.template_args.get("system_prompt")
        turns = [("system", str(system))] if system else []
        for shown_question, shown_answer in examples:
            turns += [("user", shown_question), ("assistant", shown_answer)]
        turns.append(("user", question))
        if answer is not None:
            turns.append(("assistant", answer))
        return [{"role": role, "content": content} for role, content in turns]

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        date = self.template_args.get("date_string")
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **({"date_string": date} if date else {}),
            )
        except TemplateError as error:  # it runs in a sandbox, from which it may try to get out
            raise InputError(
                f"The chat template of the tokenizer {self.tokenizer.name_or_path!r} cannot be "
                f"used ({str(error).rstrip('.')}). {OTHER_TEMPLATE}"
            ) from error


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, *, max_length: int, prefix: str = ""
) -> Encoded:
    """Plain text as tokens, all of it scored except ``prefix``; no end token is added."""
    encoding = tokenizer(prefix + text, return_offsets_mapping=True, verbose=False)
    start = next(
        (i for i, (_, end) in enumerate(encoding.offset_mapping) if end > len(prefix)),
        len(encoding.input_ids),
    )
    ids = list(encoding.input_ids)
    if ids and ids[-1] == tokenizer.eos_token_id and encoding.offset_mapping[-1] == (0, 0):
        ids.pop()
    if start >= len(ids):
        raise InputError(f"The text {text!r} is empty; there is nothing to score. Leave it out.")
    room = min(max_length, tokenizer.model_max_length)
    return _fit(ids[:start], ids[start:], room, tokenizer.bos_token_id)


def _fit(prompt: list[int], answer: list[int], max_length: int, bos: int | None) -> Encoded:
    """Join prompt and answer within ``max_length`` tokens; see :meth:`Chat.encode`."""
    room = max_length - min(len(answer), max_length // 2)
    begin = prompt[:1] if prompt[:1] == [bos] else []  # models are lost without their begin token
    kept_prompt = prompt
    if len(prompt) > room:
        kept_prompt = begin + prompt[len(prompt) - room + len(begin) :]
    kept_answer = answer[: max_length - len(kept_prompt)]
    cut = len(prompt) + len(answer) - len(kept_prompt) - len(kept_answer)
    return Encoded(kept_prompt + kept_answer, [IGNORE_INDEX] * len(kept_prompt) + kept_answer, cut)
