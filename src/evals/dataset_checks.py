"""Check how a data set is declared, and that two of them have no row in common."""

import json
import logging
from typing import Any

from unlora.config.eval_schema import check_data_set
from unlora.data.qa import refuse_one_column
from unlora.errors import InputError
from unlora.evals.datasets import Source

logger = logging.getLogger(__name__)


def check_apart(first: Source, other: Source, why: str) -> None:
    """Refuse two data sets that should have no row in common; warn of some rows.

    Args:
        why: what would be wrong.

    Raises:
        InputError: all rows of one are in the other.
    """
    rows, others = (
        {json.dumps([row.get(key) for key in source.columns], default=repr) for row in source.rows}
        for source in (first, other)
    )
    same = len(rows & others)
    if same and same == min(len(rows), len(others)):
        smaller, larger = (first, other) if same == len(rows) else (other, first)
        raise InputError(
            f"All {same} rows of {smaller.name} are in {larger.name}, too: {why}. Give other rows "
            "for one of them."
        )
    if same:
        logger.warning("%d rows are in %s and in %s: %s", same, first.name, other.name, why)


def check_source(section: Any, *above: str) -> None:
    """Refuse a declaration of a data set that cannot be read; ``above`` are the keys it is under.

    Raises:
        InputError: everything that is wrong, one mistake a line.
    """
    check_data_set(section, *above)
    if section["handler"] == "QADataset":
        refuse_one_column(section["question_key"], section["answer_key"])
