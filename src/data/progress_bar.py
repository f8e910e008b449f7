"""Show progress while many rows are tokenised."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Protocol, TypeVar

from tqdm import tqdm

AFTER = 2.0  # seconds that nobody minds waiting
EVERY = 60.0  # seconds between two lines of a log
logger = logging.getLogger(__name__)
Row = TypeVar("Row", covariant=True)


class Rows(Sized, Iterable[Row], Protocol[Row]):
    """A sequence, or whatever else has a length and can be gone through."""


def shown(rows: Rows[Row], what: str) -> Iterator[Row]:
    """The rows, under a bar in a terminal, else with a line a minute; neither if ``what`` is empty.

    Where less is to be said than messages (``--quiet``, ``--json``, other processes of a run),
    there is neither.
    """
    if not what or not logger.isEnabledFor(logging.INFO):
        yield from rows
    elif sys.stderr.isatty():
        yield from tqdm(rows, desc=what, unit="row", delay=AFTER, leave=False, dynamic_ncols=True)
    else:
        logged = time.monotonic()
        for number, row in enumerate(rows):
            if time.monotonic() - logged > EVERY:
                logger.info("%s: %d of %d rows are tokens", what, number, len(rows))
                logged = time.monotonic()
            yield row
