"""Which checkpoint a run goes on from, and where a run may not be written."""

import os
from contextlib import suppress
from pathlib import Path

from transformers import TrainingArguments

from unlora.errors import InputError
from unlora.model.lineage import FILE, Lineage
from unlora.trust import read_json, read_mapping, refuse_pickle


def checkpoint_to_resume(args: TrainingArguments, lineage: Lineage) -> str | None:
    """The checkpoint that ``resume_from_checkpoint`` means; ``true`` is the last that is whole.

    ``auto`` is that, too, or none where there is none yet.

    Raises:
        InputError: there is none, or it belongs to a run from another model.
    """
    wanted = args.resume_from_checkpoint
    if not wanted or str(wanted).lower() == "false":
        return None
    folder: str | None = str(wanted)
    if str(wanted).lower() in ("true", "auto"):
        whole = whole_checkpoints(Path(args.output_dir))
        folder = str(whole[-1]) if whole else None
        if folder is None and str(wanted).lower() == "auto":
            return None
        if folder is None:
            raise InputError(
                f"trainer.args.resume_from_checkpoint is true, but {args.output_dir!r} has no "
                "checkpoint. Set it to auto, which then starts from the beginning, and "
                "trainer.args.save_strategy=epoch."
            )
    assert folder is not None
    if not (Path(folder) / "trainer_state.json").is_file():
        raise InputError(
            f"trainer.args.resume_from_checkpoint is {wanted!r}, which is no checkpoint: it has "
            "no trainer_state.json. Give a folder such as saves/unlearn/mine/checkpoint-100."
        )
    refuse_pickle(Path(folder))
    best = read_mapping(Path(folder) / "trainer_state.json").get("best_model_checkpoint")
    if best and os.path.exists(best) and best_beside(folder, best) is None:  # if moved, it does not
        raise InputError(
            f"The checkpoint {folder!r} names {best!r} as the best one, which is not beside it. "
            "Resume from another checkpoint, or train again."
        )
    if (Path(folder) / FILE).is_file():
        stands_on = Lineage.parse(Path(folder))
        before = [link.sha256 for link in stands_on.links[:-1]]
        now = [link.sha256 for link in lineage.links]
        same_root = Path(stands_on.root).resolve() == Path(lineage.root).resolve()
        if not same_root or before not in (now, now[:-1]):
            below = " + ".join([stands_on.root, *(str(x.path) for x in stands_on.links[:-1])])
            raise InputError(
                f"The checkpoint {folder!r} belongs on {below}, but the model is {lineage}. "
                "Give the model that the interrupted run started from."
            )
    return folder


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
    return str(beside) if (beside / "trainer_state.json").is_file() else None


def whole_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run that were written to their end, the last one last.

    The state of the trainer is written after everything else.
    """
    found = []
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        with suppress(ValueError, KeyError, TypeError):
            found.append((int(read_json(state)["global_step"]), state.parent))
    return [checkpoint for _, checkpoint in sorted(found)]


def refuse_own_model(folder: str, lineage: Lineage) -> None:
    """Raises InputError where a run would overwrite a model that it is made from."""
    for used in lineage.folders:
        if used.resolve() == Path(folder).resolve():
            raise InputError(
                f"The run would be written to {folder!r}, which holds the model it starts from. "
                "Set another task_name."
            )
