"""Chat with a model in the terminal, beside the one it was unlearned from: ``unlora chat``.

A run that was unlearned with LoRA is loaded once: with its last adapter off it is its target. Other
runs are loaded beside it. Every model is asked in the template of its training.
"""

import argparse
import math
import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from unlora.errors import InputError
from unlora.runs.redaction import printable

GAP = "  │  "
HELP = """\
Type a question. Each is answered afresh: nothing said before is remembered.
  /help    this
  /quit    leave; so does Ctrl-D. Ctrl-C ends an answer."""


@dataclass(frozen=True)
class Speaker:
    """One model as it is talked to: what it is called, and how it answers a question."""

    name: str
    answer: Callable[[str], str]


def main(argv: Sequence[str]) -> None:
    """Read questions until there are no more, and print every model's answer side by side.

    Raises:
        InputError: there is no such model, or an argument is wrong.
    """
    args = _parsed(argv)
    for run in args.runs:
        _refuse_absent(run)
    talk(list(_speakers(args)), sys.stdin, sys.stdout)


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="unlora chat", add_help=False, exit_on_error=False)
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    try:
        args, strange = parser.parse_known_intermixed_args(list(argv))
    except (argparse.ArgumentError, TypeError) as error:
        raise InputError(f"{error}. Type: unlora chat --help") from error
    if strange:
        raise InputError(f"unlora chat cannot use {strange[0]!r}. Type: unlora chat --help")
    if not args.runs:
        raise InputError("Talk to which model? Type: unlora chat saves/unlearn/NAME")
    if not (0 <= args.temperature < math.inf and 1 <= args.max_new_tokens < 1 << 31):
        raise InputError(
            f"--temperature is {args.temperature} and --max-new-tokens {args.max_new_tokens}; the "
            "first must be a number of at least 0, the second at least 1."
        )
    if not 0 <= args.seed < 1 << 32:
        raise InputError(f"--seed is {args.seed}; it must be at least 0 and below 2**32.")
    return args


def _refuse_absent(run: str) -> None:
    """Raises InputError for a path that is no folder of a model, before torch is imported."""
    if os.path.isdir(run):
        known = ("config.json", "adapter_config.json", "lineage.json")
        if not any(os.path.isfile(os.path.join(run, file)) for file in known):
            raise InputError(
                f"The folder {run!r} holds no model: neither config.json nor adapter_config.json. "
                "Give the folder of a finished run, e.g. saves/unlearn/NAME."
            )
    elif (
        run != "pocket"
        and not os.path.isfile(run)
        and (
            run.startswith((".", "/", "~"))
            or run.count("/") != 1
            or os.path.isdir(run.split("/")[0])
        )
    ):
        raise InputError(
            f"There is no folder {run!r}. Give a run folder, a model folder or a repository of "
            "the hub: unlora chat saves/unlearn/NAME"
        )


# --- the models ----------------------------------------------------------------------------------


def _speakers(args: argparse.Namespace) -> Iterator[Speaker]:
    import torch

    from unlora.data.chat_encoding import Chat
    from unlora.model import get_model, resolve_model
    from unlora.model.quantised import placed

    shown: set[str] = set()
    for run in args.runs:
        resolved = resolve_model(
            {"model_args": {"pretrained_model_name_or_path": run}, "as_trained": True}
        )
        model, tokenizer = get_model(resolved, trainable=False)
        if torch.cuda.is_available() and not placed(model):
            model.to("cuda")
        chat = Chat(tokenizer, resolved.section.template_args)
        ask = partial(_answer, model, chat, args)
        links = model.lineage.links
        before = str(links[-2].path) if len(links) > 1 else model.lineage.root
        if links and before not in shown:
            yield Speaker(f"before: {before}", partial(ask, off=True))
        shown |= {before, run}
        yield Speaker(run, ask)


def _answer(
    model: Any, chat: Any, args: argparse.Namespace, question: str, *, off: bool = False
) -> str:
    """What the model says, with its last adapter ``off`` where that is asked for."""
    import torch
    from transformers import GenerationConfig

    from unlora.model.reference import last_link_off

    torch.manual_seed(args.seed)
    tokenizer, prompt = chat.tokenizer, chat.prompt(question)
    ids = torch.tensor([prompt], device=model.device)
    so_far = ids[0]

    def keep(input_ids: Any, _scores: Any, **_: Any) -> Any:
        nonlocal so_far
        so_far = input_ids[0]
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    # a repository's own settings (sampling, penalties) are not what the model says
    model.generation_config = GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=list({chat.end_id, tokenizer.eos_token_id} - {None}),
        do_sample=args.temperature > 0,
        **({"temperature": args.temperature, "top_k": 0} if args.temperature > 0 else {}),
    )
    ended = ""
    with torch.no_grad(), last_link_off(model) if off else nullcontext():
        try:
            so_far = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), stopping_criteria=[keep]
            )[0]
        except KeyboardInterrupt:
            ended = " [ended]"
    written = so_far[len(prompt) :].tolist()
    answer = chat.without_thought(written)
    # a thought that has not ended is shown, as there is nothing else
    told = tokenizer.decode(
        written if answer is None else answer,
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    return told.strip() + ended


# --- the conversation ----------------------------------------------------------------------------


def talk(speakers: Sequence[Speaker], source: Any, out: Any) -> None:
    """Ask every speaker every line of ``source`` that is not a command."""
    person = source.isatty()
    if person:
        print(f"{HELP}\n", file=out)
        with suppress(ImportError):
            import_module("readline")  # arrow keys, and earlier questions
    while True:
        try:
            question = _next(source, person)
        except KeyboardInterrupt:
            print("", file=out)
            continue
        if question is None or question in ("/quit", "/exit"):
            break
        if question.startswith("/"):
            print(HELP if question == "/help" else f"Unknown {question}. Type /help", file=out)
        elif question:
            if not person:
                print(f"> {printable(question)}", file=out)
            answers = [speaker.answer(question) for speaker in speakers]
            names = [speaker.name for speaker in speakers]
            print(side_by_side(names, answers, _width(out)) + "\n", file=out, flush=True)
    if person:
        print("", file=out)


def _next(source: Any, person: bool) -> str | None:
    if person:
        try:
            return input("> ").strip()
        except EOFError:
            return None
    line = source.readline()
    return line.strip() if line else None


def _width(out: Any) -> int:
    return shutil.get_terminal_size().columns if out.isatty() else 100


# --- text in columns -----------------------------------------------------------------------------


def side_by_side(names: Sequence[str], answers: Sequence[str], width: int) -> str:
    """The answers under their names, one column each; below each other where there is no room."""
    count = len(names)
    column = (width - len(GAP) * (count - 1)) // count
    if column < 16 and count > 1:
        return "\n".join(side_by_side([n], [a], width) for n, a in zip(names, answers, strict=True))
    cells = []
    for name, answer in zip(names, answers, strict=True):
        head = wrapped(printable(name), column)
        body = wrapped(printable(answer) or "(nothing)", column)
        cells.append([*head, "─" * max(map(cells_of, head)), *body])
    height = max(map(len, cells))
    rows = []
    for i in range(height):
        row = [cell[i] if i < len(cell) else "" for cell in cells]
        rows.append(GAP.join(text + " " * (column - cells_of(text)) for text in row).rstrip())
    return "\n".join(rows)


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` cells; words that are longer are broken."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if cells_of(longer) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            *full, line = _broken(word, width)
            lines += full
        lines.append(line)
    return lines


def _broken(word: str, width: int) -> list[str]:
    pieces, piece, used = [], "", 0
    for sign in word:
        wide = cells_of(sign)
        if used + wide > width and piece:
            pieces.append(piece)
            piece, used = "", 0
        piece, used = piece + sign, used + wide
    return [*pieces, piece]


def cells_of(text: str) -> int:
    """How many cells of a terminal a text takes: two for a wide sign, none for an accent."""
    return sum(
        0
        if unicodedata.category(sign) in ("Mn", "Me", "Cf")
        else 2
        if unicodedata.east_asian_width(sign) in "WF"
        else 1
        for sign in text
    )
