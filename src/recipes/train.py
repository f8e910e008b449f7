"""Fine-tune or unlearn.

python src/train.py --config-name=unlearn experiment=unlearn/tofu/lora
"""

import logging
from typing import Any

logger = logging.getLogger("unlora.recipes.train")


def run(cfg: Any, *, evaluate: bool = True) -> dict[str, float]:
    """Train as the config says and evaluate the result.

    Args:
        evaluate: False leaves out the evaluation at the end.

    Returns:
        The summary of every evaluation suite: metric -> value.

    Raises:
        InputError: something in the config, the data or the model can be put right by its writer.
    """
    from unlora.config import read

    config = read(cfg)  # a mistake in it is reported before torch is imported

    from unlora.config.resolve import plain
    from unlora.evals.passes.batching import halvings
    from unlora.recipes.training import Training, log_summary
    from unlora.recipes.training_plan import TrainingPlan, show_first_rows
    from unlora.runs.row_hashes import write_row_hashes
    from unlora.runs.run import Run, alone, full_disk_in_words

    plan = TrainingPlan.check(config, evaluate=evaluate)
    if config.plan:
        show_first_rows(plan)
        return {}
    folder = config.paths.output_dir
    with full_disk_in_words(folder), halvings() as halved, alone(folder):
        record = Run(folder, plain(cfg) | plan.sections)
        data = plan.load_data()
        model = plan.load_model(data.parts)
        with Training.opened(plan, data, model) as training:
            record.begin(fresh=plan.resume is None)
            hashed = write_row_hashes(plan.folder, data.texts, resumed=plan.resume is not None)
            arithmetic = training.train()
            size = training.save()
            summary = training.evaluate() if evaluate else {}
        record.finish(
            **training.facts(arithmetic, halved), row_hashes=hashed, size=size, summary=summary
        )
        log_summary(summary, plan, data)
        logger.info("finished: %s", folder)
    if evaluate:
        logger.info("next: %s", next_command(config.mode, folder))
    return summary


def next_command(mode: str, folder: str) -> str:
    """What one would do with a run that is finished."""
    if mode == "finetune":
        own = "experiment=unlearn/own/lora data.forget=FILE data.retain=FILE trainer=NPO"
        return f"unlora chat {folder}, or: unlora unlearn model={folder} {own}"
    return f"unlora report {folder}, unlora chat {folder}, or: unlora export {folder} --merged"
