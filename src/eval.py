"""Evaluate a model: ``python src/eval.py experiment=eval/tofu/default task_name=mine``."""

import logging
from typing import Any

logger = logging.getLogger("unlora.eval")


def run(cfg: Any) -> dict[str, float]:
    """Evaluate the model of the config with every suite of its section ``eval``.

    Returns:
        metric -> value, over all suites.

    Raises:
        InputError: something in the config or the data can be put right by its writer.
    """
    from unlora.config import plain, read

    config = read(cfg)

    from unlora.evals import build_suites, check
    from unlora.model import get_model, load_tokenizer
    from unlora.model.guards import evaluation_is_pure
    from unlora.run import Run

    check(config.eval)
    suites = build_suites(
        config.eval,
        tokenizer=load_tokenizer(config.model),
        template_args=config.model.template_args,
        datasets_dir=config.paths.datasets_dir,
    )
    folder = config.paths.output_dir
    record = Run(folder, plain(cfg), kind="eval")
    record.begin(fresh=False)
    model, _ = get_model(config.model, trainable=False)
    summary: dict[str, float] = {}
    with evaluation_is_pure(model):
        for suite in suites:
            summary |= suite.evaluate(model, suite.output_dir)
    record.finish(lineage=str(model.lineage), summary=summary)
    logger.info("finished: %s", folder)
    return summary


if __name__ == "__main__":
    try:
        from unlora.cli import launch
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"{error}. Install this program first: pip install -e . (or make demo)"
        ) from error
    launch(run, "eval")
