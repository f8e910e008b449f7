"""Read other tools' row formats as questions and answers.

| columns | what they are |
|---|---|
| ``messages``, ``conversations`` | turns: ``role``, ``content``; ShareGPT's ``from``, ``value`` |
| ``instruction``, ``output``; ``input``, ``system``, ``history`` | Alpaca |
| ``prompt``, ``completion`` | texts, or turns |

Of a conversation every answer is a row of its own, after all that was said before it.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from unlora.data.template import Turns
from unlora.errors import InputError

ANSWER = "answer"  # the column of answers where none is named
SHAPES = (
    ("messages",),
    ("conversations",),
    ("conversation",),
    ("instruction", "output"),
    ("prompt", "completion"),
)
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant",
}  # fmt: skip
# what a turn may hold beside its text that would be lost; and the value that means nothing
NOT_READ = {
    "tool_calls": None, "function_call": None, "reasoning_content": None, "reasoning": None,
    "thinking": None, "weight": 1, "train": True,
}  # fmt: skip
logger = logging.getLogger(__name__)


def as_questions(
    rows: Sequence[dict[str, Any]], question_key: str, answer_key: str, *, of: str = ""
) -> list[dict[str, Any]]:
    """The rows with a question in one column and its answer in another.

    Rows that have a column ``question_key`` are as they are, but for an Alpaca row's ``input``,
    which stands behind its ``instruction``. Of others the answer is read, too, where ``answer_key``
    is not the name of another column.

    Raises:
        InputError: rows are of two shapes at once, or a conversation is none of questions and
            answers.
    """
    columns = dict.fromkeys(column for row in rows for column in row)
    shapes = [shape for shape in SHAPES if all(column in columns for column in shape)]
    if question_key in columns:
        alpaca = question_key == "instruction" and "input" in columns
        if not alpaca:
            return list(rows)
        shapes = [("instruction", "output")]
    if not shapes:
        return list(rows)
    if len(shapes) > 1:
        either = " or ".join(" and ".join(shape) for shape in shapes)
        raise InputError(
            f"The rows have more than one conversation each: {either}. Leave all but one out, or "
            "set question_key and answer_key to columns of questions and answers."
        )
    [shape] = shapes
    answers_too = answer_key not in columns and answer_key == ANSWER
    questions = []
    for number, row in enumerate(rows):
        try:
            pairs = _pairs(row, shape)
        except InputError as error:
            raise InputError(f"Row {number}{error}") from error
        if answer_key in columns and len(pairs) > 1:
            raise InputError(
                f"Row {number} has {len(pairs)} answers in its conversation and one in its column "
                f"{answer_key!r}. Give each question a row of its own."
            )
        for question, answer in pairs:
            new = {question_key: question} | ({answer_key: answer} if answers_too else {})
            questions.append({**row, **new})
    if answers_too or question_key == shape[0]:
        _say(shape, columns, len(rows), len(questions), of)
    return questions


def _say(
    shape: Sequence[str], columns: Mapping[str, Any], rows: int, questions: int, of: str
) -> None:
    what = f"{of}: " if of else ""
    if shape[0] == "instruction":
        behind = ", its column 'input' behind it" if "input" in columns else ""
        logger.info("%sthe question is the column 'instruction'%s", what, behind)
    elif questions == rows:
        logger.info("%sconversations in the column %r", what, shape[0])
    else:
        logger.info(
            "%s%d answers in the %d conversations of the column %r; each is a row of its own",
            what, questions, rows, shape[0],
        )  # fmt: skip


def _pairs(row: Mapping[str, Any], shape: Sequence[str]) -> list[tuple[str | Turns, str]]:
    """The questions of one row, each with what was said before it, and their answers."""
    if row.get("tools"):
        raise InputError(" has tools, which are not read. Leave the column or the row out.")
    system = row.get("system") or None
    if shape == ("instruction", "output"):
        return [_alpaca(row, system)]
    if shape == ("prompt", "completion"):
        prompt, completion = row.get("prompt"), row.get("completion")
        if isinstance(prompt, str) and isinstance(completion, str):
            return [(prompt, completion)]
        return _of_turns([*_listed(prompt, "user"), *_listed(completion, "assistant")], system)
    return _of_turns(_listed(row.get(shape[0]), "user"), system)


def _alpaca(row: Mapping[str, Any], system: str | None) -> tuple[str | Turns, Any]:
    instruction, more = row.get("instruction"), row.get("input")
    if not isinstance(instruction, str) or not isinstance(more, (str, type(None))):
        raise InputError(" has an instruction or an input that is no text. Correct it.")
    question = f"{instruction}\n{more}" if more and more.strip() else instruction
    history = tuple((str(q), str(a)) for q, a in row.get("history") or ())
    prompt = Turns(question, history, system) if history or system else question
    return prompt, row.get("output")


def _listed(turns: Any, role: str) -> list[Any]:
    """Turns as a list; a text alone is one turn, and JSON in a cell is what it says."""
    if isinstance(turns, str):
        try:
            told = json.loads(turns) if turns.lstrip().startswith("[") else None
        except ValueError:
            told = None
        turns = told if isinstance(told, list) else [{"role": role, "content": turns}]
    if not isinstance(turns, (list, tuple)):
        raise InputError(f" has {repr(turns)[:80]} where its conversation should be, a list.")
    return list(turns)


def _of_turns(turns: Sequence[Any], system: str | None) -> list[tuple[str | Turns, str]]:
    spoken = [_turn(turn) for turn in turns]
    if spoken and spoken[0][0] == "system":
        system, spoken = spoken[0][1], spoken[1:]
    roles = [role for role, _ in spoken]
    if not spoken or roles != ["user", "assistant"] * (len(spoken) // 2):
        order = ", ".join(roles[:6]) or "nothing"
        raise InputError(
            f" has a conversation of {order}{', ...' if len(roles) > 6 else ''}. It must be a "
            "question and an answer in turn, after a system prompt if there is one, and end with "
            "an answer. Correct it, or leave it out."
        )
    texts = [text for _, text in spoken]
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    prompts = [Turns(question, tuple(pairs[:n]), system) for n, (question, _) in enumerate(pairs)]
    return [
        (turns if turns.before or system else question, answer)
        for turns, (question, answer) in zip(prompts, pairs, strict=True)
    ]


def _turn(turn: Any) -> tuple[str, str]:
    """Who speaks in a turn, and what is said."""
    if not isinstance(turn, Mapping):
        raise InputError(f" has {repr(turn)[:80]} as a turn; it must hold role and content.")
    for key, nothing in NOT_READ.items():
        if turn.get(key) not in (None, nothing, [], ""):
            raise InputError(f" has a turn with {key}, which is not read. Leave it or the row out.")
    name, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if name not in ROLES:
        raise InputError(
            f" has a turn of {repr(name)[:80]}; turns are of system, user and assistant (human and "
            "gpt). Leave the row out."
        )
    if isinstance(content, (list, tuple)):
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if not any(text is None for text in texts):
            content = "".join(map(str, texts))
    if not isinstance(content, str):
        raise InputError(
            f" has a turn that says {repr(content)[:80]}; it must be text. Leave the row out."
        )
    return ROLES[name], content
