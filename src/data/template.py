"""Locate an answer within what a chat template writes around it.

    <|user|>Who wrote it?<|end|><|assistant|><think></think>    Ana Silva    <|end|>
    ------------------------ prompt ------------------------   - answer -   ending

The place is taken from the rendered whole conversation, with the template's own variables. The
template's generation prompt may end before it (a closed empty thought, a channel, the header of a
template that knows no generation prompt) or open a thought that is no answer, so nothing relies on
it but a model that is to think before it answers.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from jinja2 import Environment, TemplateError, meta
from jinja2.ext import loopcontrols

from unlora.errors import InputError
from unlora.registry import unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OTHER_TEMPLATE = (
    "Use another tokenizer, or set model.template_args.apply_chat_template=false and give the "
    "*_tag strings."
)
# stand for question and answer where the template alone is wanted; answers begin with a letter
ASKED, ANSWERED = "Q" * 8, "A" * 8
# what begins a thought, and what comes between it and the answer
THOUGHTS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel|>", "<|channel|>final<|message|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
    ("<thought>", "</thought>"),
)
TO_THINK = ("enable_thinking", "thinking")  # what templates call it
# what a template is told, or apply_chat_template takes, beside the variables of a config
OURS = ("messages", "conversation", "chat_template", "add_generation_prompt", "date_string",
        "continue_final_message", "tokenize", "tokenizer_kwargs", "padding", "truncation",
        "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
        "sanitize_control_tokens", "tools", "documents")  # fmt: skip


@dataclass(frozen=True)
class Turns:
    """A question with what was said before it.

    Attributes:
        before: questions and answers.
        system: in the place of the system prompt of the model's config.
    """

    question: str
    before: tuple[tuple[str, str], ...] = ()
    system: str | None = None


class Template:
    """How conversations are laid out for one tokenizer, by its chat template or by tags.

    Args:
        args: ``template_args`` of a model's config.

    Raises:
        InputError: the template cannot be used.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", args: Mapping[str, object]):
        self.tokenizer, self.args = tokenizer, args
        self.is_chat = bool(args.get("apply_chat_template"))
        if not self.is_chat:
            return
        if not tokenizer.chat_template:
            raise InputError(
                f"apply_chat_template is true, but the tokenizer {tokenizer.name_or_path!r} "
                "has no chat template. Set model.template_args.apply_chat_template=false and give "
                "the *_tag strings, or use a tokenizer with a template."
            )
        self._check_variables()
        if ASKED not in self._own_prompt(Turns(ASKED)):
            raise self._unusable("it leaves out what the user says")
        if self._in_thought(self.prompt(Turns(ASKED))):
            raise self._unusable("it puts the answer into a thought")

    @cached_property
    def source(self) -> str:
        """The template's own text, or that of the tags."""
        if self.is_chat:
            return self.tokenizer.get_chat_template()
        return "".join(str(tag or "") for tag in self.args.values())

    @cached_property
    def variables(self) -> dict[str, object]:
        """What the config sets in the template."""
        date, variables = self.args.get("date_string"), self.args.get("chat_template_kwargs")
        more = dict(variables) if isinstance(variables, Mapping) else {}
        return {**({"date_string": date} if date else {}), **more}

    @cached_property
    def thought(self) -> tuple[str, str] | None:
        """What begins and what ends a thought, where the template knows of thoughts."""
        known = (marks for marks in THOUGHTS if marks[1] in self.source)
        return next(known, None) if self.is_chat else None

    @property
    def thinks(self) -> bool:
        """Whether the model is to think before it answers."""
        return any(self.variables.get(name) is True for name in TO_THINK)

    @cached_property
    def opens_thought(self) -> bool:
        """Whether what generation continues ends in a thought."""
        return self._in_thought(self.generation_prompt(Turns(ASKED)))

    @cached_property
    def own_prompt_opens_thought(self) -> bool:
        """Whether the template's own generation prompt ends in a thought."""
        return self._in_thought(self._own_prompt(Turns(ASKED)))

    def prompt(self, turns: Turns) -> str:
        """All that stands before the answer."""
        return self._around(turns)[0]

    def generation_prompt(self, turns: Turns) -> str:
        """What a model goes on from: the prompt, or where it thinks, the template's own."""
        if not self.thinks:
            return self.prompt(turns)
        return self._own_prompt(turns)

    @cached_property
    def ending(self) -> str:
        """What comes after an answer, up to the end of the conversation."""
        return self._around(Turns(ASKED))[1]

    @cached_property
    def strips_answers(self) -> bool:
        """Whether it takes white space off an answer."""
        if not self.is_chat:
            return False
        text = self._render(self._messages(Turns(ASKED), f" {ANSWERED} "))
        return f" {ANSWERED} " not in text and f"{ANSWERED} " not in text

    def _around(self, turns: Turns) -> tuple[str, str]:
        if not self.is_chat:
            return self._in_tags(turns), str(self.args.get("asst_end_tag") or "")
        text = self._render(self._messages(turns, ANSWERED))
        before, there, after = text.rpartition(ANSWERED)
        if not there:
            raise self._unusable("it leaves out what the assistant says")
        return before, after

    def _own_prompt(self, turns: Turns) -> str:
        return self._render(self._messages(turns), add_generation_prompt=True)

    def _in_thought(self, text: str) -> bool:
        """Whether a thought begins in this text and does not end there."""
        if self.thought is None:
            return False
        begin, end = self.thought
        return text.rfind(begin) > text.rfind(end)

    def _in_tags(self, turns: Turns) -> str:
        tag = {key: str(value or "") for key, value in self.args.items()}

        def ask(question: str) -> str:
            user = tag.get("user_start_tag", "") + question + tag.get("user_end_tag", "")
            return user + tag.get("asst_start_tag", "")

        if turns.system is not None:
            raise InputError(
                "A conversation of the data has a system prompt, and the template by tags has no "
                "place for it. Leave it out, or set model.template_args.apply_chat_template=true."
            )
        shown = "".join(ask(q) + a + tag.get("asst_end_tag", "") for q, a in turns.before)
        return tag.get("system_prompt_with_special_tokens", "") + shown + ask(turns.question)

    def _messages(self, chat: Turns, answer: str | None = None) -> list[dict[str, str]]:
        system = self.args.get("system_prompt") if chat.system is None else chat.system
        turns = [("system", str(system))] if system else []
        for question, answered in chat.before:
            turns += [("user", question), ("assistant", answered)]
        turns.append(("user", chat.question))
        if answer is not None:
            turns.append(("assistant", answer))
        return [{"role": role, "content": content} for role, content in turns]

    def _render(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
    ) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        except Exception as error:  # a template of others fails in ways of its own
            raise self._unusable(" ".join(str(error).split())[:200].rstrip(".")) from error

    def _unusable(self, why: str) -> InputError:
        return InputError(
            f"The chat template of the tokenizer {self.tokenizer.name_or_path!r} cannot be used "
            f"({why}). {OTHER_TEMPLATE}"
        )

    def _check_variables(self) -> None:
        """Raises InputError for a variable that the template does not read, or that is set here."""
        variables = self.args.get("chat_template_kwargs") or {}
        assert isinstance(variables, Mapping)  # the config is typed
        for name, value in variables.items():
            what = f"template_args.chat_template_kwargs.{name}"
            if name in OURS:
                raise InputError(f"{what} is set by this program itself. Leave it out.")
            if name in TO_THINK and not isinstance(value, bool):
                raise InputError(f"{what} is {value!r}; it must be true or false.")
            if name in TO_THINK and self.thought:
                continue  # some models always think, and their templates do not ask
            if name not in (read := self._read()):
                known = [x for x in read if x not in OURS and not x.endswith("_token")]
                raise InputError(
                    unknown("variable of the chat template in chat_template_kwargs", name, known)
                )

    def _read(self) -> list[str]:
        """The variables that the template reads, of which it is told nothing else."""
        source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", self.source)
        try:
            # parsed and never rendered, so there is nothing to escape
            parsed = Environment(extensions=[loopcontrols]).parse(source)  # noqa: S701
        except TemplateError as error:
            raise self._unusable(str(error)) from error
        functions = ("raise_exception", "strftime_now")
        return sorted(meta.find_undeclared_variables(parsed) - {*functions})
