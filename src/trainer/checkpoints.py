"""Write checkpoints that are whole: hashed when written, checked before use.

``checkpoint.json`` in a checkpoint holds the sha256 of every other file, and what else a resumed
run has to know (``unlora.trainer.resume``). It is written with ``trainer_state.json``, after
everything else, so a checkpoint that was not written to its end has neither.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from unlora.errors import InputError
from unlora.model.lineage import FILE, Lineage, fingerprint
from unlora.runs.atomic_files import write_bytes
from unlora.runs.hashes import sha256
from unlora.runs.redaction import without_secrets
from unlora.runs.safe_loading import read_json, read_mapping, refuse_pickle

RECORD = "checkpoint.json"
NO_RECORD = f"it has no {RECORD}, so nothing says whether it is whole"
NAME = re.compile(r"checkpoint-(\d+)")
logger = logging.getLogger(__name__)


def write_record(folder: Path, state: Path, facts: Mapping[str, Any]) -> None:
    """Write ``checkpoint.json`` beside the file ``state``, with the hashes of all files of both.

    Args:
        folder: the checkpoint as far as it is written.
        state: its ``trainer_state.json``, which is about to be moved there.
        facts: what else is recorded.
    """
    files = {name: sha256(folder / name) for name in _files(folder) if name != RECORD}
    content = without_secrets({**facts, "files": files | {state.name: sha256(state)}})
    text = json.dumps({"sha256": _digest(content), **content}, indent=2)
    write_bytes(state.with_name(RECORD), text.encode())


def read_record(checkpoint: str | Path) -> dict[str, Any]:
    """What ``checkpoint.json`` says; nothing of a checkpoint without one.

    Raises:
        ValueError: it is damaged.
    """
    file = Path(checkpoint) / RECORD
    if not file.is_file():
        return {}
    content = read_json(file)
    if not isinstance(content, dict) or content.pop("sha256", None) != _digest(content):
        raise ValueError(f"{file} is damaged")
    if not isinstance(content.get("files"), dict):
        raise ValueError(f"{file} names no files")
    return content


def damage(checkpoint: str | Path) -> str | None:
    """How a checkpoint differs from what was written, as the end of a sentence; None if whole."""
    folder = Path(checkpoint)
    if not (folder / TRAINER_STATE_NAME).is_file():
        return f"it was not written to its end: it has no {TRAINER_STATE_NAME}"
    try:
        record = read_record(folder)
    except (OSError, ValueError):
        return f"its {RECORD} is damaged"
    if not record:
        return NO_RECORD
    for name, written in record["files"].items():
        try:
            if not (folder / name).is_file():
                return f"its {name} is missing"
            if sha256(folder / name) != written:
                return f"its {name} is not as it was written"
        except OSError as error:
            return f"its {name} cannot be read: {error.strerror}"
    return None


def fault(checkpoint: str | Path, *, needs_best: bool = False) -> str | None:
    """Why a run cannot go on from a checkpoint, as the end of a sentence; None where it can.

    Args:
        needs_best: the best checkpoint that it names is needed at the end of the run.
    """
    folder = Path(checkpoint)
    if why := damage(folder):
        return why
    if read_record(folder).get("weights_only"):
        return "it has no optimiser (trainer.args.save_only_model)"
    named = read_mapping(folder / TRAINER_STATE_NAME).get("best_model_checkpoint")
    best = folder.parent / Path(str(named)).name
    if needs_best and named and best != folder and (why := damage(best)):
        return f"of {best.name}, the best one until then, {why}"
    return None


def checkpoint_to_resume(
    args: TrainingArguments, lineage: Lineage, *, unchecked: bool = False
) -> str | None:
    """The checkpoint that ``resume_from_checkpoint`` means; ``true`` is the last that is whole.

    ``auto`` is that, too, or none where there is none yet.

    Args:
        unchecked: one that does not say whether it is whole is taken, too.

    Raises:
        InputError: there is none, or it belongs to a run from another model.
    """
    wanted = args.resume_from_checkpoint
    if not wanted or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() in ("true", "auto"):
        folder = _newest_whole(args, str(wanted).lower() == "auto", unchecked)
        if folder is None:
            return None
    else:
        folder = Path(wanted)
        if not (folder / TRAINER_STATE_NAME).is_file():
            raise InputError(
                f"trainer.args.resume_from_checkpoint is {wanted!r}, which is no checkpoint: it "
                "has no trainer_state.json. Give a folder such as saves/unlearn/mine/"
                "checkpoint-100."
            )
        refuse_pickle(folder)
        why = fault(folder, needs_best=args.load_best_model_at_end)
        if why and not (unchecked and why is NO_RECORD):
            whole = whole_checkpoints(folder.parent, needs_best=args.load_best_model_at_end)
            others = f"{str(whole[-1])!r}" if whole else "auto, which begins anew"
            raise InputError(
                f"The checkpoint {str(folder)!r} cannot be gone on from: {why}. "
                + (_TAKE_IT if why is NO_RECORD else "")
                + f"Set trainer.args.resume_from_checkpoint to {others}."
            )
    refuse_pickle(folder)
    _refuse_best_of_another_run(folder)
    _refuse_other_model(folder, lineage)
    return str(folder)


_TAKE_IT = (
    "An earlier version of this program may have written it: trainer.on_change=resume takes it "
    "without a check. "
)


def _newest_whole(args: TrainingArguments, auto: bool, unchecked: bool) -> Path | None:
    passed_over: list[str] = []
    for folder in checkpoints(Path(args.output_dir)):
        why = fault(folder, needs_best=args.load_best_model_at_end)
        if why is None or (unchecked and why is NO_RECORD):
            if passed_over:
                logger.warning("%s; going on from %s", "; ".join(passed_over), folder.name)
            return folder
        passed_over.append(f"{folder.name} is not used: {why}")
        if why is NO_RECORD:
            passed_over[-1] += f". {_TAKE_IT.strip()}"
    reasons = "; ".join(reason.rstrip(".") for reason in passed_over)
    if auto and any(NO_RECORD in reason for reason in passed_over):
        raise InputError(
            f"trainer.args.resume_from_checkpoint is auto, but {args.output_dir!r} has no whole "
            f"checkpoint: {reasons}. Leave out resume_from_checkpoint to begin anew."
        )
    if auto:
        if passed_over:
            logger.warning("%s; there is no other, so the run begins anew", reasons)
        return None
    old = any(NO_RECORD in reason for reason in passed_over)  # auto would refuse them, too
    advice = (
        "Leave it out to begin anew."
        if old
        else "Set it to auto, which then starts from the beginning, and "
        "trainer.args.save_strategy=epoch."
    )
    raise InputError(
        f"trainer.args.resume_from_checkpoint is true, but {args.output_dir!r} has no "
        f"{'whole ' if reasons else ''}checkpoint{f': {reasons}' if reasons else ''}. {advice}"
    )


def _refuse_best_of_another_run(folder: Path) -> None:
    best = read_mapping(folder / TRAINER_STATE_NAME).get("best_model_checkpoint")
    if best and os.path.exists(best) and best_beside(str(folder), best) is None:
        raise InputError(  # if the run was moved, it does not exist
            f"The checkpoint {str(folder)!r} names {best!r} as the best one, which is not beside "
            "it. Resume from another checkpoint, or train again."
        )


def _refuse_other_model(folder: Path, lineage: Lineage) -> None:
    if not (folder / FILE).is_file():
        return
    stands_on = Lineage.parse(folder)
    before = [link.sha256 for link in stands_on.links[:-1]]
    now = [link.sha256 for link in lineage.links]
    same_root = Path(stands_on.root).resolve() == Path(lineage.root).resolve()
    if not same_root or before not in (now, now[:-1]):
        below = " + ".join([stands_on.root, *(str(x.path) for x in stands_on.links[:-1])])
        raise InputError(
            f"The checkpoint {str(folder)!r} belongs on {below}, but the model is {lineage}. "
            "Give the model that the interrupted run started from."
        )
    if lineage.local_root and stands_on.fingerprint not in (None, fingerprint(lineage.root)):
        raise InputError(
            f"The root model {lineage.root!r} has changed since the checkpoint {str(folder)!r} was "
            "written. Put the old weights back, or train again."
        )


def best_beside(folder: str, best: str) -> str | None:
    """The best checkpoint in the run of another one; in a copied run its name is that of the copy.

    Args:
        folder: the checkpoint that the run goes on from.
        best: as it was recorded.
    """
    run = Path(folder).parent
    if os.path.realpath(os.path.dirname(best)) == os.path.realpath(run):
        return best
    beside = run / os.path.basename(best)
    return str(beside) if (beside / TRAINER_STATE_NAME).is_file() else None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, whole or not, the last one first."""
    named = [(NAME.fullmatch(path.name), path) for path in folder.glob("checkpoint-*")]
    numbered = [(int(match[1]), path) for match, path in named if match and path.is_dir()]
    return [path for _, path in sorted(numbered, reverse=True)]


def whole_checkpoints(folder: Path, *, needs_best: bool = False) -> list[Path]:
    """The checkpoints of a run that can be gone on from, the last one last."""
    return [c for c in reversed(checkpoints(folder)) if fault(c, needs_best=needs_best) is None]


def refuse_own_model(folder: str, lineage: Lineage) -> None:
    """Raises InputError where a run would overwrite a model that it is made from."""
    for used in lineage.folders:
        if used.resolve() == Path(folder).resolve():
            raise InputError(
                f"The run would be written to {folder!r}, which holds the model it starts from. "
                "Set another task_name."
            )


def _files(folder: Path) -> Iterator[str]:
    """The files below a folder, but for those that are being written."""
    for at, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.endswith(".tmp"))
        for name in sorted(names):
            if not name.endswith(".tmp"):
                yield Path(at, name).relative_to(folder).as_posix()


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
