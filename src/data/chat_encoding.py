"""Tokenise questions and answers: which tokens are read, which are scored.

    <|im_start|>user  Who wrote it? <|im_end|> <|im_start|>assistant   Ana  Silva <|im_end|>
    ------------------------------ prompt ------------------------   -------- scored -------

The answer and exactly one end token are scored. The border is found by character offsets of the
whole text, tokenised once, so a merge across the border hides no answer token. What stands before
an answer is for :mod:`unlora.data.template` to say.
"""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING

from unlora.data.control_tokens import ControlTokens, Tokens
from unlora.data.encoded import Encoded, cut_prompt, fit
from unlora.data.progress_bar import shown
from unlora.data.template import Template, Turns
from unlora.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Chat", "Encoded"]

AT_ONCE = 64  # texts that are tokenised together
STAND_IN = "A"  # an answer that begins with a letter, where only the prompt is wanted
Example = tuple[str | Turns, str]  # a question, and its answer
VERSION = 2  # raise it where a text comes to be other tokens than before


@dataclass(frozen=True)
class Chat:
    """How one model is asked: its tokenizer and the ``template_args`` of its config.

    With ``apply_chat_template`` the tokenizer's own template is used, with ``system_prompt``,
    ``date_string`` and ``chat_template_kwargs`` where given; otherwise the ``*_tag`` strings are
    put around question and answer.
    """

    tokenizer: "PreTrainedTokenizerBase"
    template_args: Mapping[str, object]

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise InputError(
                f"The tokenizer {self.tokenizer.name_or_path!r} has no fast version; answers are "
                "found by character offsets, which only fast tokenizers give. Convert it first."
            )
        _ = self.template

    @cached_property
    def template(self) -> Template:
        return Template(self.tokenizer, self.template_args)

    @cached_property
    def control(self) -> ControlTokens:
        return ControlTokens(self.tokenizer, self.template.source)

    @property
    def end_id(self) -> int:
        """The token that ends an answer in this template, e.g. ``<|im_end|>``."""
        return self._end[1]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all that decides how a text becomes tokens: tokenizer and template."""
        parts = (
            self.tokenizer.backend_tokenizer.to_str(),
            str(self.tokenizer.chat_template),
            json.dumps(dict(self.template_args), sort_keys=True, default=str),
            self.template.prompt(Turns("Q")),  # a template may write today's date
            str(self._end),
            str(VERSION),
        )
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()

    def encode(
        self,
        question: str | Turns,
        answer: str,
        *,
        max_length: int = 512,
        examples: Sequence[Example] = (),
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
        pairs: Sequence[Example],
        *,
        max_length: int = 512,
        examples: Sequence[Example] = (),
        of: str = "",
    ) -> list[Encoded]:
        """:meth:`encode` of many questions and answers, which is faster than one by one.

        Args:
            of: what a progress bar calls them; none is shown without it.
        """
        return [*self.encode_each(pairs, max_length=max_length, examples=examples, of=of)]

    def encode_each(
        self,
        pairs: Sequence[Example],
        *,
        max_length: int = 512,
        examples: Sequence[Example] = (),
        of: str = "",
    ) -> Iterator[Encoded]:
        """:meth:`encode_all`, one after the other, as they are asked for."""
        for question, answer in pairs:
            if not answer.strip():
                raise InputError(
                    f"The answer to {_words(question)} is empty; there is nothing to score. Give "
                    "one, or leave the row out."
                )
        room = min(max_length, self.tokenizer.model_max_length)
        split = self._split(self._texts(shown(pairs, of), examples), self._end[0])
        for (question, _), (prompt, scored) in zip(pairs, split, strict=True):
            if not scored:
                raise InputError(
                    f"The tokenizer {self.tokenizer.name_or_path!r} makes no token of the answer "
                    f"to {_words(question)}. Leave the row out, or use another tokenizer."
                )
            scored.append(self.end_id)
            yield fit(prompt, scored, room, self.tokenizer.bos_token_id)

    def prompt(self, question: str | Turns, *, examples: Sequence[Example] = ()) -> list[int]:
        """What generation continues; see :meth:`prompts`."""
        return self.prompts([question], examples=examples)[0].input_ids

    def prompts(
        self,
        questions: Sequence[str | Turns],
        *,
        examples: Sequence[Example] = (),
        room: int = 1 << 30,
    ) -> list[Encoded]:
        """What generation continues after each question, with no token scored.

        It is what stands before the answer in :meth:`encode`, or the template's own generation
        prompt where the model is to think. It depends on no answer: white space at its end can be
        one token with what follows, so there it ends as before an answer that begins with a letter.

        Args:
            room: in tokens; a prompt that is longer loses its beginning but for the begin token.
        """
        texts = (self.template.generation_prompt(self._asked(q, examples)) for q in questions)
        pairs = ((text, STAND_IN if text[-1:].isspace() else "") for text in texts)
        bos = self.tokenizer.bos_token_id
        return [cut_prompt(prompt, room, bos) for prompt, _ in self._split(pairs)]

    def without_thought(self, written: list[int]) -> list[int] | None:
        """What a model has written as its answer: what comes after its thought, if it had one.

        None where the thought has not come to its end.
        """
        if self.template.thought is None:
            return written
        begin, end = self.template.thought

        def text(length: int) -> str:
            return self.tokenizer.decode(written[:length], clean_up_tokenization_spaces=False)

        whole = text(len(written))
        if not (ends := whole.count(end)):
            thinking = self.template.opens_thought or whole.lstrip().startswith(begin)
            return None if thinking else written
        lengths = range(len(written) + 1)
        return written[bisect_left(lengths, ends, key=lambda n: text(n).count(end)) :]

    @cached_property
    def _end(self) -> tuple[str, int]:
        """What the template writes between an answer and the token that ends it, and that token."""
        ending = self.template.ending
        if match := self.control.first_in(ending):
            token = self.tokenizer.convert_tokens_to_ids(match[0])
            swallows = self.tokenizer.added_tokens_decoder[token].lstrip
            between = ending[: match.start()]
            return between.rstrip() if swallows else between, token
        if self.tokenizer.eos_token_id is None:
            raise InputError(
                f"The tokenizer {self.tokenizer.name_or_path!r} has no end-of-sequence token."
            )
        return "", self.tokenizer.eos_token_id

    def _asked(self, question: str | Turns, examples: Sequence[Example]) -> Turns:
        """A question after examples, as the template may see it."""
        hide = self.control.hide
        turns = _turns(question)
        before = [
            *(turn for q, a in examples for turn in (*_turns(q).before, (_turns(q).question, a)))
        ]
        before += turns.before
        return Turns(
            hide(turns.question),
            tuple((hide(q), hide(a)) for q, a in before),
            None if turns.system is None else hide(turns.system),
        )

    def _texts(
        self, pairs: Iterable[Example], examples: Sequence[Example]
    ) -> Iterator[tuple[str, str]]:
        """Prompt and answer of each pair as text; questions that come again are laid out once."""
        prompts: dict[Turns, str] = {}
        for question, answer in pairs:
            turns = self._asked(question, examples)
            if turns not in prompts:
                prompts[turns] = self.template.prompt(turns)
            told = answer.strip() if self.template.strips_answers else answer
            yield prompts[turns], self.control.hide(told)

    def _split(
        self, texts: Iterable[tuple[str, str]], after: str = ""
    ) -> Iterator[tuple[list[int], list[int]]]:
        """The tokens of each prompt, and those of its answer and of what comes ``after`` it.

        Some at a time, as offsets take more memory than all else; and one number is one object,
        so that a token is kept in 8 bytes. An answer without a token of its own gets none.
        """
        eos, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        shared: dict[int, int] = {}
        waiting = iter(texts)
        while some := list(islice(waiting, AT_ONCE)):
            for prompt, answer, (tokens, places) in self._tokenised(some, after):
                ids, offsets = [shared.setdefault(token, token) for token in tokens], list(places)
                while ids and ids[-1] == eos and offsets[-1][0] == offsets[-1][1]:
                    ids.pop(), offsets.pop()  # some tokenizers end every text themselves
                if len(ids) > 1 and bos is not None and ids[0] == ids[1] == bos:
                    ids, offsets = ids[1:], offsets[1:]  # the text brought its own
                begins, ends = len(prompt), len(prompt) + len(answer)
                start = next((i for i, (_, end) in enumerate(offsets) if end > begins), len(ids))
                if start < len(ids) and offsets[start][0] >= ends:
                    yield ids[:start], []
                else:
                    yield ids[:start], ids[start:]

    def _tokenised(
        self, texts: Sequence[tuple[str, str]], after: str
    ) -> Iterator[tuple[str, str, Tokens]]:
        """Prompts and answers with the tokens and offsets of both, and of what comes after."""
        add = not self.template.is_chat
        hiding = [self.control.are_hidden_in(prompt + answer) for prompt, answer in texts]
        signed = self.control.signed
        texts = [
            (signed(prompt), signed(answer)) if hides else (prompt, answer)
            for hides, (prompt, answer) in zip(hiding, texts, strict=True)
        ]
        joined: dict[bool, list[str]] = {True: [], False: []}
        for hides, (prompt, answer) in zip(hiding, texts, strict=True):
            joined[hides].append(prompt + answer + after)
        tokens = {
            True: iter(self.control.encode(joined[True], add_special_tokens=add)),
            False: iter(self._plain_tokens(joined[False], add_special_tokens=add)),
        }
        for hides, (prompt, answer) in zip(hiding, texts, strict=True):
            yield prompt, answer, next(tokens[hides])

    def _plain_tokens(self, texts: list[str], *, add_special_tokens: bool) -> Iterator[Tokens]:
        if not texts:
            return iter(())
        encoding = self.tokenizer(
            texts,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
            verbose=False,  # of rows that are too long, the number that is cut is said
        )
        return zip(encoding.input_ids, encoding.offset_mapping, strict=True)


def _turns(question: str | Turns) -> Turns:
    return question if isinstance(question, Turns) else Turns(question)


def _words(question: str | Turns) -> str:
    return repr(_turns(question).question[:200])
