"""Evaluate a model: from a config to the figures of a benchmark.

    config -> requests -> questions (pass, data) -> records -> metrics -> log

A metric declares by its signature what it needs (:mod:`unlora.evals.metrics`); the plan asks each
question once (:mod:`unlora.evals.pass_plan`); answers are kept on disk
(:mod:`unlora.evals.runner`); only the passes call a model (:mod:`unlora.evals.passes`).
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from unlora.errors import InputError
from unlora.evals.eval_model import LazyModel
from unlora.evals.harness import HANDLER, HarnessSuite, check_harness
from unlora.evals.progress import Bar
from unlora.evals.suite import Suite
from unlora.evals.suite_checks import KINDS, check_suite
from unlora.registry import unknown

HANDLERS = (*KINDS, HANDLER)


def check(eval_config: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse whatever can be seen to be wrong without data, tokenizer or model.

    Raises:
        InputError: everything that is wrong, in one message.
    """
    problems = []
    for name, config in eval_config.items():
        try:
            handler = config.get("handler")
            if handler not in HANDLERS:
                raise InputError(f"eval.{name}: {unknown('handler', handler, HANDLERS)}")
            (check_harness if handler == HANDLER else check_suite)(name, config)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))


def build_suites(
    eval_config: Mapping[str, Mapping[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    template_args: Mapping[str, Any],
    datasets_dir: str | None = None,
    prepare: bool = True,
) -> list[Suite | HarnessSuite]:
    """The suites of a config, their data read.

    Args:
        eval_config: the section ``eval``: name -> ``handler`` and its settings.
        template_args: how the model is asked, see :class:`unlora.data.chat_encoding.Chat`.
        datasets_dir: folder with local copies of hub data sets.
        prepare: make the data into tokens now, and not when they are first asked about.

    Raises:
        InputError: something in the config or the data is wrong; no model was called yet.
    """
    check(eval_config)
    common = {"tokenizer": tokenizer, "template_args": template_args}
    suites = [
        HarnessSuite(name, config, **common)
        if config["handler"] == HANDLER
        else Suite(name, config, datasets_dir=datasets_dir, **common)
        for name, config in eval_config.items()
    ]
    for suite in suites:
        if prepare and isinstance(suite, Suite):
            suite.prepare()
    for first, other in combinations(suites, 2):
        if shared := first.metrics.keys() & other.metrics.keys():
            raise InputError(
                f"Two suites of one run have the metric {min(shared)}, and one would hide the "
                "other. Evaluate with one suite, and run src/eval.py for the other."
            )
    return suites


def evaluate_all(
    suites: Sequence[Suite | HarnessSuite],
    model: nn.Module | LazyModel,
    folder: str | Path | None = None,
    *,
    quiet: bool = False,
) -> dict[str, float]:
    """Evaluate a model with every suite, under one bar.

    Args:
        folder: where the logs go; where each suite's config says without it.

    Returns:
        metric -> value, over all suites.
    """
    summary: dict[str, float] = {}
    with Bar(quiet=quiet) as bar:
        for suite in suites:
            output = suite.output_dir if folder is None else Path(folder)
            summary |= suite.evaluate(model, output, bar=bar)
    return summary


__all__ = ["HarnessSuite", "LazyModel", "Suite", "build_suites", "check", "evaluate_all"]
