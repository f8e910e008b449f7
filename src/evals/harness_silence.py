"""Silence lm-evaluation-harness: our bar is the only one, and warnings are seen."""

import io
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from typing import Any


@contextmanager
def in_silence() -> Iterator[None]:
    """No bars of lm-eval's own, no reports of its steps, and nothing asked about this machine.

    It would ask git for the commit of whatever folder it is in, which complains where that is no
    repository, and for seconds what is installed; nobody reads either.
    """
    import tqdm
    from lm_eval import evaluator
    from lm_eval.api import task

    no_bar = partial(tqdm.tqdm, disable=True)
    with ExitStack() as stack:
        stack.enter_context(quiet("lm_eval", logging.WARNING))
        stack.enter_context(redirect_stdout(io.StringIO()))
        for module in (tqdm, task):
            stack.enter_context(_replaced(module, "tqdm", no_bar))
        stack.enter_context(_replaced(evaluator, "get_git_commit_hash", lambda: None))
        stack.enter_context(_replaced(evaluator, "add_env_info", lambda results: None))
        yield


@contextmanager
def quiet(name: str, level: int) -> Iterator[None]:
    """A logger says nothing below this level."""
    chatter = logging.getLogger(name)
    before = chatter.level
    chatter.setLevel(level)
    try:
        yield
    finally:
        chatter.setLevel(before)


@contextmanager
def _replaced(module: Any, name: str, stand_in: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, stand_in)
    try:
        yield
    finally:
        setattr(module, name, before)
