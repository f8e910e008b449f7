"""Write other answers to the forget questions: ``python src/alternates.py experiment=...``.

AltPO (Mekala et al. 2024, arXiv:2409.13474) prefers them to the answers that are to be forgotten.
The model that is to forget makes them itself; repeats, temperature and length are those of the
authors, https://github.com/molereddy/Alternate-Preference-Optimization/blob/1c9e595/generate.py.
"""

import json
import logging
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from unlora.data.chat_encoding import Chat

FILE = "alternates.jsonl"
logger = logging.getLogger("unlora.recipes.alternate_answers")


@dataclass(frozen=True)
class Pair:
    """A forget question and the answer that is to be forgotten."""

    question: str
    answer: str


def run(cfg: Any) -> dict[str, Any]:
    """Write ``alternates.jsonl`` into the run folder: a line for each forget row, in their order.

    Its columns are ``question``, ``answer`` (the list of alternates) and ``original``.

    Returns:
        How many answers were sampled, rejected and filled in.

    Raises:
        InputError: something in the config or the data can be put right by its writer.
    """
    from unlora.config import read
    from unlora.config.resolve import plain

    config = read(cfg)

    from unlora.data.chat_encoding import Chat
    from unlora.errors import InputError
    from unlora.model import check_model, get_model, load_tokenizer, resolve_model
    from unlora.model.guards import evaluation_is_pure
    from unlora.model.reference import adapters_off
    from unlora.runs.run import Run, alone
    from unlora.trainer import refuse_own_model

    resolved = resolve_model(config.model)
    settings: dict[str, Any] = dict(config.alternates)
    of_root = settings.pop("voice") == "root"
    pairs = read_pairs(config.data["forget"] or {}, config.paths.datasets_dir)
    folder = config.paths.output_dir
    check_model(resolved)
    if of_root and not resolved.lineage.links:
        raise InputError(
            "alternates.voice is root, but the model has no adapters that could be switched off. "
            "Set alternates.voice=model."
        )
    with alone(folder):
        record = Run(folder, plain(cfg))
        refuse_own_model(folder, resolved.lineage)
        chat = Chat(load_tokenizer(resolved), resolved.section.template_args)
        model, _ = get_model(resolved, trainable=False)
        record.begin(fresh=True)
        with evaluation_is_pure(model), adapters_off(model) if of_root else nullcontext():
            alternates, counts = make(model, chat, pairs, **settings)
        file = Path(folder) / FILE
        write_rows(file, pairs, alternates)
        record.finish(lineage=str(model.lineage), **counts)
    print(
        f"{file}: {counts['alternates']} other answers to {counts['rows']} questions. Next:\n"
        "unlora unlearn experiment=... trainer=AltPO data/datasets@data.alternate=alternates "
        + shlex.quote(f"data.alternate.alternates.args.hf_args.path={file}")
    )
    return counts


def read_pairs(forget: Mapping[str, Any], datasets_dir: str | None) -> list[Pair]:
    """The forget rows in the order in which an unlearning run reads them.

    Raises:
        InputError: a data set cannot be read, or holds no questions.
    """
    from unlora.errors import InputError

    pairs: list[Pair] = []
    for name, data_set in forget.items():
        try:
            pairs += _pairs_of(data_set or {}, datasets_dir)
        except InputError as error:
            raise InputError(f"Data set {name}: {error}") from error
    return pairs


def make(
    model: "nn.Module",
    chat: "Chat",
    pairs: Sequence[Pair],
    *,
    repeats: int,
    tries: int,
    seed: int,
    prompt: str | None,
    **generation: Any,
) -> tuple[list[list[str]], dict[str, Any]]:
    """Other answers to every question, as the model writes them, and how many were rejected.

    What cannot be used is asked for again: an answer that is empty or does not end, that is the
    original but for case and space, or that the row has already. A row that is still short after
    ``tries`` repeats what it has; one that has nothing gets ways to say "I don't know".

    Every draw is fixed by (seed, row, how often the row was asked before), so batches do not
    matter, except that rounding, in bfloat16 above all, may turn a draw.

    Args:
        repeats: how many other answers each row gets.
        prompt: what the model is asked; the question alone if None.
        generation: ``batch_size``, ``max_new_tokens``, ``temperature``, ``top_p``.

    Raises:
        InputError: not one answer of any row could be used.
    """
    from unlora.errors import InputError

    prompts = [chat.prompt(_request(prompt, pair)) for pair in pairs]
    answers: list[list[str]] = [[] for _ in pairs]
    draws, rejected = [0] * len(pairs), Counter[str]()
    for number in range(1, tries + 1):
        wanted = [row for row, has in enumerate(answers) for _ in range(repeats - len(has))]
        if not wanted:
            break
        keys = []
        for row in wanted:
            keys.append((seed, row, draws[row]))
            draws[row] += 1
        texts = _sample(model, chat, [prompts[row] for row in wanted], keys, number, **generation)
        for row, text in zip(wanted, texts, strict=True):
            if why := _unusable(text, [pairs[row].answer, *answers[row]]):
                rejected[why] += 1
            else:
                answers[row].append(str(text).strip())
    if not any(answers):
        raise InputError(
            f"None of the {sum(draws)} answers can be used: {_listed(rejected)}. Raise "
            "alternates.temperature or alternates.max_new_tokens, or word alternates.prompt "
            "differently."
        )
    return _filled(answers, repeats, seed), _counted(answers, repeats, sum(draws), rejected)


def write_rows(file: Path, pairs: Sequence[Pair], alternates: Sequence[list[str]]) -> None:
    """Write the data set; the file is whole or not there."""
    from unlora.runs.atomic_files import is_main_process, write_text

    if not is_main_process():
        return
    rows = (
        {"question": pair.question, "answer": others, "original": pair.answer}
        for pair, others in zip(pairs, alternates, strict=True)
    )
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _pairs_of(data_set: Mapping[str, Any], datasets_dir: str | None) -> list[Pair]:
    from unlora.data import HANDLERS
    from unlora.data.conversations import as_questions
    from unlora.data.qa import read_pairs as questions_and_answers
    from unlora.data.rows import load_rows
    from unlora.errors import InputError
    from unlora.registry import unknown

    handler, args = data_set.get("handler"), data_set.get("args") or {}
    if handler not in HANDLERS:
        raise InputError(unknown("handler", handler, HANDLERS))
    if handler == "PretrainingDataset":
        raise InputError(
            "it is running text, which asks nothing that could be answered otherwise. Choose an "
            "experiment on questions, such as unlearn/tofu/lora."
        )
    rows = load_rows(**args["hf_args"], datasets_dir=datasets_dir)
    keys = args.get("question_key", "question"), args.get("answer_key", "answer")
    pairs = []
    for question, answer in questions_and_answers(as_questions(rows, *keys), *keys):
        if not isinstance(question, str):
            raise InputError(
                "the forget data are conversations of several turns or with a system prompt of "
                "their own. Other answers are written to single questions: give such data."
            )
        pairs.append(Pair(question, answer))
    return pairs


def _request(prompt: str | None, pair: Pair) -> str:
    # in one go: a question may itself hold "{answer}"
    named = {"{question}": pair.question, "{answer}": pair.answer}
    return re.sub("|".join(named), lambda name: named[name[0]], prompt or "{question}")


def _sample(
    model: "nn.Module",
    chat: "Chat",
    prompts: Sequence[Sequence[int]],
    keys: Sequence[Sequence[int]],
    number: int,
    *,
    temperature: float,
    top_p: float,
    **generation: Any,
) -> list[str | None]:
    from tqdm import tqdm

    from unlora.evals.passes import Sampling, generate
    from unlora.runs.atomic_files import is_main_process

    hidden = None if is_main_process() else True
    with tqdm(total=len(prompts), unit="answer", desc=f"try {number}", disable=hidden) as bar:
        return generate(
            model,
            prompts,
            chat.tokenizer,
            end_ids=sorted({chat.end_id, chat.tokenizer.eos_token_id} - {None}),
            sampling=Sampling(keys, temperature, top_p),
            only_ended=True,
            answer_of=chat.without_thought,
            progress=bar.update,
            **generation,
        )


def _unusable(text: str | None, known: Sequence[str]) -> str:
    """Why an answer cannot be an alternate beside the original and the earlier ones, if so."""
    if text is None:
        return "unfinished"
    folded = [_folded(other) for other in known]
    if not text.strip():
        return "empty"
    if _folded(text) == folded[0]:
        return "original"
    return "repeated" if _folded(text) in folded else ""


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _filled(answers: Sequence[list[str]], repeats: int, seed: int) -> list[list[str]]:
    import numpy as np

    lines = resources.files("unlora.data").joinpath("refusals.txt").read_text("utf-8").splitlines()
    refusals = [line for line in lines if line.strip()]
    filled = []
    for row, has in enumerate(answers):
        source = has or np.random.default_rng((seed, row)).permutation(refusals).tolist()
        filled.append([source[i % len(source)] for i in range(repeats)])
    return filled


def _counted(
    answers: Sequence[list[str]], repeats: int, sampled: int, rejected: Counter[str]
) -> dict[str, Any]:
    none = sum(not has for has in answers)
    short = sum(0 < len(has) < repeats for has in answers)
    if rejected:
        logger.info("%d answers sampled; not taken: %s", sampled, _listed(rejected))
    if none or short:
        logger.warning(
            "%d of %d questions have fewer than %d different alternates and repeat theirs; %d more "
            "have none and got refusals. Raise alternates.tries or alternates.temperature.",
            short, len(answers), repeats, none,
        )  # fmt: skip
    return {
        "rows": len(answers),
        "alternates": repeats * len(answers),
        "sampled": sampled,
        "rejected": dict(rejected),
        "filled_by_repeating": sum(repeats - len(has) for has in answers if has),
        "filled_with_refusals": repeats * none,
        "rows_that_repeat": short,
        "rows_of_refusals": none,
    }


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {why}" for why, number in sorted(counts.items()))
