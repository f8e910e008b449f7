"""Train for some steps on a few of the rows, and score the others. arXiv:2410.08827."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from unlora.audits.attack import ShortTraining, TrainingData, attack
from unlora.errors import InputError
from unlora.registry import AtLeastOne, Index, UpToOne


def check_rates_and_steps(settings: Mapping[str, Any]) -> None:
    """Raises InputError unless learning rates are above 0 and steps rise from 1 on."""
    rates, steps = settings["learning_rates"], settings["steps"]
    if not rates or min(rates) <= 0:
        raise InputError(f"learning_rates of attack relearn is {rates!r}; all must be above 0.")
    if not steps or steps[0] < 1 or sorted(set(steps)) != [*steps]:
        raise InputError(
            f"steps of attack relearn is {steps!r}; they must rise, the first 1 or more."
        )


@attack("relearn", check=check_rates_and_steps)
def relearn(
    data: TrainingData,
    *,
    trains_on: Literal["forget", "retain"] = "forget",
    share: UpToOne = 0.1,
    least: AtLeastOne = 8,
    most: AtLeastOne = 64,
    learning_rates: tuple[float, ...] = (2e-5, 2e-4, 1e-3),
    steps: tuple[int, ...] = (5, 20, 60),
    rank: AtLeastOne = 16,
    batch_size: AtLeastOne = 8,
    seed: Index = 0,
) -> list[ShortTraining]:
    """LoRA on a share of the forget rows, or on retain rows only; one training per learning rate.

    What the attack itself teaches is no credit to it: rows that were trained on are not scored.

    Args:
        trains_on: which rows; a key ``on`` would be read as true by YAML.
        share, least, most: of the forget rows, those that are trained on; of the retain rows
            ``most``, or all where there are fewer.
        steps: of the optimiser, after which the forget rows are scored.

    Raises:
        InputError: fewer forget rows would be scored than trained on, or there are no retain rows.
    """
    if trains_on == "forget":
        total = data.forget
        count = min(max(int(round(share * total, 6)), least), most)
        if total - count < count:
            raise InputError(
                f"Relearning would train on {count} of {total} forget rows and score the others, "
                "which must be as many at least. Set share, least or most of the attack lower, or "
                "leave it out."
            )
    else:
        total, count = data.retain, min(most, data.retain)
        if not count:
            raise InputError("There are no retain rows to train on. Leave the attack out.")
    drawn = np.random.default_rng(seed).choice(total, count, replace=False)
    rows = tuple(sorted(drawn.tolist()))
    return [
        ShortTraining(trains_on, rows, rate, tuple(steps), rank, batch_size, seed)
        for rate in learning_rates
    ]
