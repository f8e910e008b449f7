"""Check the models and rows of an audit before any of them is asked."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unlora.audits.subject import AuditedModel
from unlora.config.audit_config import AuditConfig
from unlora.errors import InputError
from unlora.evals.datasets import Source
from unlora.recipes.run_history import History, run_config, same_origin
from unlora.recipes.who_saw import who_saw

COLUMNS = ("question_key", "answer_key", "text_key")
logger = logging.getLogger(__name__)


def refuse_another_root(unlearned: AuditedModel, retain: AuditedModel) -> None:
    """Refuse a retain model that was made from another model.

    Raises:
        InputError: it was.
    """
    ours, theirs = History.of(unlearned.path).origin, History.of(retain.path).origin
    if not same_origin(ours, theirs):
        raise InputError(
            f"The retain model {retain.path!r} was made from {theirs!r}, and {unlearned.path!r} "
            f"from {ours!r}: what one of them knows says nothing of the other. Give a "
            "retain_model that was made from the same model, or retain_model=null."
        )


def check_models(unlearned: AuditedModel, target: AuditedModel, retain: AuditedModel) -> None:
    """Refuse a target that is the retain model; name what makes the others hard to compare.

    Raises:
        InputError: target and retain model are the same.
    """
    if target.key is not None and target.key == retain.key:
        raise InputError(
            f"Target {target.path!r} and retain model {retain.path!r} are the same model. Give "
            "target=RUN, the model before unlearning, and retain_model=RUN, one that never saw "
            "the forget rows."
        )
    if unlearned.key is not None and unlearned.key == retain.key:  # an exact request's, on purpose
        logger.warning("%s is its own retain model: by that, nothing is left in it", unlearned.path)
    for other in (target, retain):
        _warn_of_another_template(unlearned, other)


def _warn_of_another_template(unlearned: AuditedModel, other: AuditedModel) -> None:
    """Say that a model is not asked as it was trained."""
    ours, theirs = (model.resolved.section.template_args for model in (unlearned, other))
    if ours != theirs and run_config(Path(other.path)):
        logger.warning(
            "%s was trained in another template than %s, and is asked in the latter's: it may know "
            "more than shows", other.path, unlearned.path
        )  # fmt: skip


def warn_of_rows_it_never_saw(target: AuditedModel, forget: Source) -> None:
    """Say that some forget rows are new to the model that knew them; all may be the root's."""
    if not run_config(Path(target.path)) or forget.config.get("question_format"):
        return
    columns = {key: forget.config[key] for key in COLUMNS if key in forget.config}
    try:
        seen = who_saw(forget.rows, [target.path], **columns)
    except InputError:  # none of the texts that rows are known by
        return
    new = sum(not row for row in seen.rows)
    # questions as running text, or the other way round, are near to what was trained on at best
    alike = any(sighting.match == "exact" for row in seen.rows for sighting in row)
    if new and alike and not seen.unknown:
        logger.warning(
            "%s was not trained on %d of the %d forget rows that the audit asks about, so that its "
            "figures are not those of the rows that were to be forgotten. Give these: "
            "data.forget.hf_args",
            target.path, new, len(forget),
        )  # fmt: skip


def warn_of_other_sets(
    config: AuditConfig,
    trained: Mapping[str, Any],
    declared: Mapping[str, dict[str, Any] | None],
) -> None:
    """Say which data sets of the training have no part in the audit."""
    for part in declared:
        sets = (trained.get("data") or {}).get(part)
        if part not in config.data and isinstance(sets, Mapping) and len(sets) > 1:
            logger.warning(
                "the run has %d data sets as %s data (%s), and the audit asks about one: %s. To "
                "ask about another, give data.%s.hf_args", len(sets), part, ", ".join(sets),
                (declared[part] or {}).get("hf_args"), part,
            )  # fmt: skip
