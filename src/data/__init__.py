"""Turn the rows of a data set into the tokens of a batch.

    rows -> qa / text -> Encoded -> Parts, KeyedSampler -> collate -> batch

A config names each part of the data (``train``, ``forget``, ``retain``, ``alternate``) and in it
one or more data sets, each with a handler:

* ``QADataset``: columns ``question_key`` and ``answer_key``, or :mod:`unlora.data.conversations`;
* ``QAwithIdkDataset``: the same, with a refusal as alternate answer to each question;
* ``PretrainingDataset``: running text in column ``text_key``.
"""

import hashlib
import logging
from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from unlora.data.chat_encoding import Chat, Encoded
from unlora.data.encoded import without_end
from unlora.data.pairs import Parts
from unlora.data.qa import answers, refusals, say_what_is_text, text_of
from unlora.data.row_texts import RowText, pair_texts, text_pieces
from unlora.data.rows import load_rows
from unlora.data.text import chunks
from unlora.errors import InputError
from unlora.registry import unknown

HANDLERS = ("QADataset", "QAwithIdkDataset", "PretrainingDataset")
logger = logging.getLogger(__name__)


def load_part(
    part: Mapping[str, Mapping[str, Any]],
    chat: Chat,
    *,
    of: str = "",
    datasets_dir: str | None = None,
    idk_seed: int | None = None,
    record: Callable[[list[RowText]], object] | None = None,
) -> list[Encoded]:
    """All rows of one part of the data.

    Args:
        part: name -> ``{"handler": ..., "args": {"hf_args": ..., ...}}``.
        of: what messages call the part, e.g. ``data.forget``.
        idk_seed: with it, refusals to the questions instead of their answers.
        record: is given the texts of the rows, but for such refusals.
    """
    encoded: list[Encoded] = []
    for name, config in part.items():
        handler, args = config.get("handler"), dict(config.get("args") or {})
        what = f"{name} of {of}" if of else name
        if handler not in HANDLERS:
            raise InputError(unknown(f"handler of data set {name}", handler, HANDLERS))
        try:
            rows = load_rows(**args.pop("hf_args"), datasets_dir=datasets_dir)
            new = _encode(handler, rows, args, chat, idk_seed, what, record)
        except InputError as error:
            raise InputError(f"Data set {what}: {error}") from error
        if not new:
            raise InputError(f"Data set {name} has no rows.")
        cut = sum(row.cut > 0 for row in new)
        level = logging.WARNING if cut else logging.INFO
        logger.log(level, "%s: %d rows, %d of them cut to the maximal length", what, len(new), cut)
        encoded += new
    return encoded


def load_parts(
    data: Mapping[str, Any],
    chat: Chat,
    needed: tuple[str, ...],
    *,
    seed: int,
    datasets_dir: str | None = None,
    score_forget_end: bool = True,
    record: Callable[[str, list[RowText]], object] | None = None,
) -> Parts:
    """The parts of the data that an objective needs, and no others.

    Alternate answers that no data set gives are refusals to the forget questions.

    Args:
        data: the section ``data`` of a config: part -> data sets, and ``anchor``.
        needed: of ``forget``, ``retain``, ``alternate``.
        score_forget_end: false leaves the token that ends a forget answer out of the loss: ending
            an answer is nothing to forget.
        record: is given the name of each part in the config, and the texts of its rows.

    Raises:
        InputError: a part that is needed is not configured.
    """
    loaded = {}
    for part in needed:
        idk_seed, named = None, part
        source = data.get(part)
        if part == "retain" and not source:
            source, named = data.get("train"), "train"
        if part == "alternate" and not source:
            source, idk_seed = data.get("forget"), seed
        if not source:
            raise InputError(
                f"The objective needs {part} data, but data.{part} is not set. "
                f"Add it with data/datasets@data.{part}=NAME."
            )
        loaded[part] = load_part(
            source, chat, of=f"data.{named}", datasets_dir=datasets_dir, idk_seed=idk_seed,
            record=partial(record, named) if record else None,
        )  # fmt: skip
    if not score_forget_end:
        if "forget" not in loaded:
            raise InputError(
                "trainer.score_forget_end is false, but there are no forget data here, whose end "
                "tokens it leaves out of the loss. Leave it out."
            )
        loaded["forget"] = [without_end(row, chat.end_id) for row in loaded["forget"]]
    _check_not_the_same(loaded)
    if "alternate" in loaded and len(loaded["alternate"]) % len(loaded["forget"]):
        raise InputError(
            f"There are {len(loaded['alternate'])} alternate answers for "
            f"{len(loaded['forget'])} forget rows; give the same number for each."
        )
    if "alternate" in loaded:
        _check_same_questions(loaded["forget"], loaded["alternate"])
    anchor = str(data.get("anchor") or "forget")
    if anchor not in ("forget", "retain"):
        raise InputError(unknown("data.anchor", anchor, ("forget", "retain")))
    return Parts(loaded, anchor if anchor in loaded else next(iter(loaded)))


def _check_not_the_same(loaded: Mapping[str, Sequence[Encoded]]) -> None:
    """Raises InputError where all that is to be kept is to be forgotten; warns of a part of it."""
    forget = {tuple(row.input_ids) for row in loaded.get("forget", ())}
    retain = [tuple(row.input_ids) for row in loaded.get("retain", ())]
    same = sum(row in forget for row in retain)
    if same and same == len(retain):
        raise InputError(
            f"All {same} rows of data.retain are also in data.forget, so that the same is to be "
            "kept and forgotten. Give other rows for one of them."
        )
    if same:
        logger.warning("%d of %d rows of data.retain are in data.forget, too", same, len(retain))


def _check_same_questions(forget: Sequence[Encoded], alternate: Sequence[Encoded]) -> None:
    """Raises InputError where alternates answer another question than that of their forget row."""
    choices = len(alternate) // len(forget)
    for number, other in enumerate(alternate):
        row = forget[number // choices]
        # a token at the border may hold the beginning of the answer
        shared = min(row.prompt_length, other.prompt_length) - 1
        if not (row.cut or other.cut) and row.input_ids[:shared] != other.input_ids[:shared]:
            raise InputError(
                f"Row {number} of data.alternate answers another question than row "
                f"{number // choices} of data.forget. Give alternates that were made for these "
                "forget data, in their order."
            )


def fingerprint(rows: Sequence[Encoded]) -> dict[str, object]:
    """How many rows, and the sha256 of all their tokens and labels."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(array("q", [len(row.input_ids), *row.input_ids, *row.labels]).tobytes())
    return {"rows": len(rows), "sha256": digest.hexdigest()}


def _encode(
    handler: str,
    rows: list[dict],
    args: dict[str, Any],
    chat: Chat,
    idk_seed: int | None,
    of: str,
    record: Callable[[list[RowText]], object] | None,
) -> list[Encoded]:
    known = {
        "QADataset": ("question_key", "answer_key", "max_length"),
        "QAwithIdkDataset": ("question_key", "answer_key", "max_length", "idk_path"),
        "PretrainingDataset": ("text_key", "max_length"),
    }[handler]
    for key in args:
        if key not in known:
            raise InputError(unknown(f"argument of {handler}", key, ("hf_args", *known)))
    if handler == "PretrainingDataset":
        if idk_seed is not None:
            raise InputError(
                "running text has no question to refuse. Choose an objective without alternate "
                "answers, or set data.alternate."
            )
        key = args.get("text_key", "text")
        for number, row in enumerate(rows):
            if key not in row:
                raise InputError(f"row {number} has no column {key!r}; it has: {', '.join(row)}.")
        texts = [text_of(row[key], key, number) for number, row in enumerate(rows)]
        say_what_is_text([""] * len(texts), texts, chat, of=of)
        if record:
            record([piece for text in texts for piece in text_pieces(text)])
        return chunks(chat.control, texts, max_length=args.get("max_length", 2048))
    idk_path = args.pop("idk_path", None)
    if idk_seed is None:
        on_pairs = (lambda pairs: record(pair_texts(pairs))) if record else None
        return answers(rows, chat, of=of, on_pairs=on_pairs, **args)
    return refusals(rows, chat, seed=idk_seed, idk_path=idk_path, of=of, **args)
