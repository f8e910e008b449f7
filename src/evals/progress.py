"""Show one progress bar for a whole evaluation."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
from transformers.utils import logging as of_transformers

from unlora.runs.atomic_files import is_main_process

EVERY = 60.0  # seconds between two lines, where there is no terminal
logger = logging.getLogger(__name__)


class Bar:
    """How many of the tokens that an evaluation asks about are done, and which pass is at work.

    Where there is no terminal to draw it in, a line a minute says the same.

    Args:
        quiet: show nothing.
    """

    def __init__(self, *, quiet: bool = False):
        self.quiet = quiet
        self.depth = 0
        self.tokens = self.total = 0
        self.started = self.said = time.monotonic()

    def __enter__(self) -> "Bar":
        if self.depth == 0:
            self.bar: Any = tqdm(
                total=0,
                unit="tok",
                unit_scale=True,
                disable=True if self.quiet or not is_main_process() else None,
                leave=False,
                dynamic_ncols=True,
            )
        self.depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.bar.close()

    def expect(self, kind: str, tokens: int) -> None:
        """A suite has this much to ask."""
        self.kind = kind
        self.total += tokens
        self.bar.total += tokens
        self.bar.refresh()

    def done(self, name: str, tokens: int) -> None:
        """A pass has done this much."""
        self.bar.set_description(f"{self.kind} {name}", refresh=False)
        self.bar.update(tokens)
        self.tokens += tokens
        now = time.monotonic()
        if self.bar.disable and not self.quiet and is_main_process() and now - self.said >= EVERY:
            self.said = now
            left = (now - self.started) * (self.total - self.tokens) / max(self.tokens, 1)
            logger.info(
                "%s %s: %.0f %% of %d tokens, about %.0f min left",
                self.kind, name, 100 * self.tokens / max(self.total, 1), self.total, left / 60,
            )  # fmt: skip


@contextmanager
def without_library_bars() -> Iterator[None]:
    """The bars with which transformers loads weights and datasets reads rows are not shown."""
    import datasets

    shown = of_transformers.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    of_transformers.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown[0]:
            of_transformers.enable_progress_bar()
        if shown[1]:
            datasets.enable_progress_bars()
