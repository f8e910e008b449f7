"""Search the settings of each method, with the same number of trials for every method.

Trials are stages of a seed of their own. Each round, every method tries one setting, so that
methods run side by side and the trials of one method learn from each other. What Optuna proposes
is kept in ``search.db`` and depends on the seed and the trials before alone, so a search that was
stopped goes on as if it had not been.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from unlora.errors import InputError
from unlora.registry import unknown
from unlora.results.eval_log import KINDS, read_written
from unlora.runs.hashes import digest
from unlora.studies import scheduler
from unlora.studies.config import EVERY, Study
from unlora.studies.launchers import Launch
from unlora.studies.stages import Stage, references, unlearning, variants


@dataclass(frozen=True)
class Judgement:
    """Of one trial.

    Attributes:
        distance: to gold, as a share of the target's distance: 0 is gold, 1 the target.
        utility: as a share of the target's.
        value: what the search makes small.
    """

    distance: float
    utility: float
    feasible: bool
    value: float


def judge(
    values: Mapping[str, float | None],
    target: Mapping[str, float | None],
    gold: Mapping[str, float | None],
    *,
    forget: Sequence[str],
    utility: str,
    keep: float,
) -> Judgement | None:
    """How close a model is to gold in what is to be forgotten, subject to its utility.

    The distance is the mean over the metrics ``forget`` of ``|x - gold| / |target - gold|``. A
    trial is feasible if it keeps the share ``keep`` of the target's ``utility``; one that is not
    comes after all that are, the closer to that share the better.

    Returns:
        None where the trial lacks a figure.

    Raises:
        InputError: target or gold lack a figure, or do not differ in one.
    """
    for whose, summary in (("target", target), ("gold", gold)):
        for name in (*forget, utility):
            if not isinstance(summary.get(name), float):
                raise InputError(
                    f"search.objective asks for {name}, which the {whose} has no value of. "
                    + unknown("metric", name, [k for k, v in summary.items() if v is not None])
                )
    if not target[utility]:
        raise InputError(
            f"search.objective asks for {utility}, which is 0 for the target: no share of it can "
            "be kept. Choose another."
        )
    apart = {name: abs(target[name] - gold[name]) for name in forget}  # type: ignore[operator]
    for name, gap in apart.items():
        if gap == 0:
            raise InputError(
                f"search.objective asks for {name}, in which target and gold do not differ. "
                "Choose metrics that tell them apart."
            )
    if any(not isinstance(values.get(name), float) for name in (*forget, utility)):
        return None
    distance = fmean(
        abs(values[name] - gold[name]) / gap  # type: ignore[operator]
        for name, gap in apart.items()
    )
    share = values[utility] / target[utility]  # type: ignore[operator]
    feasible = share >= keep
    # those that are not feasible come behind all that are, however far these are from gold
    value = distance / (1 + distance) if feasible else 1 + keep - share
    return Judgement(distance, share, feasible, value)


def search(
    study: Study, folder: Path, launch: Launch, done: scheduler.Done
) -> tuple[dict[str, tuple[str, ...]], list[dict[str, Any]]]:
    """Try settings for every method.

    Returns:
        method -> the overrides of its best trial; and all trials, for the report.

    Raises:
        InputError: target or gold of the search's seed could not be made.
    """
    home, seed = folder / "search", study.search["seed"]
    models, gold, target = references(study, folder, home, seed)
    scheduler.run(models, folder, launch, done)
    for stage in (gold, target):
        if stage is not None and stage.name not in done.finished:
            why = "; ".join(done.failed.values())
            raise InputError(f"The search needs {stage.run}, which could not be made: {why}")
    assert gold is not None  # settings.read sees to it
    methods = {
        name: Method(study, name, overrides, home)
        for name, overrides in variants(study.methods).items()
    }
    for number in range(study.search["trials"]):
        trials: dict[str, tuple[Any, list[Stage]]] = {}
        for name, method in methods.items():
            trial = method.ask(number)
            if trial is not None:
                trial_folder = home / name / f"{number:03d}"
                run = f"{name}-trial{number:03d}"
                stages = unlearning(
                    study, trial_folder, run, method.fixed, seed, target, gold, trial.params
                )
                trials[name] = trial, stages
        scheduler.run([s for _, stages in trials.values() for s in stages], folder, launch, done)
        for name, (trial, stages) in trials.items():
            values = summary(stages[-1]) if stages[-1].name in done.finished else {}
            judged = judge(values, summary(target), summary(gold), **study.search["objective"])
            methods[name].tell(trial, judged)
    best = {name: method.best() for name, method in methods.items()}
    return best, [row for method in methods.values() for row in method.trials()]


class Method:
    """The trials of one method, in ``search.db``."""

    def __init__(self, study: Study, name: str, overrides: Sequence[str], home: Path):
        self.name, self.fixed, self.search = name, overrides, study.search
        space = self.search["space"]
        base = name if name in space else name.split(",")[0]
        self.space = {**space.get(EVERY, {}), **space.get(base, {})}
        # trials for another question are no trials for this one
        question = digest(study.target, study.gold, study.unlearn, list(overrides), self.space,
                          self.search["seed"], self.search["objective"])  # fmt: skip
        home.mkdir(parents=True, exist_ok=True)
        self.storage = f"sqlite:///{home / 'search.db'}"
        self.key = f"{name}-{question[:16]}"
        self.study = self._opened(0)

    def ask(self, number: int) -> Any:
        """The trial of this number; None if its result is there already."""
        import optuna

        self.study = self._opened(number)
        known = self.study.get_trials(deepcopy=False)
        if number >= len(known):
            trial = self.study.ask()
        elif known[number].state.is_finished():
            return None
        else:  # it was stopped
            trial = optuna.trial.Trial(self.study, known[number]._trial_id)
        for key, values in self.space.items():
            if isinstance(values, list):
                trial.suggest_categorical(key, values)
            else:
                low, high = float(values["low"]), float(values["high"])
                trial.suggest_float(key, low, high, log=bool(values.get("log")))
        return trial

    def tell(self, trial: Any, judged: Judgement | None) -> None:
        """What came of a trial; without a figure it has failed, and still counts."""
        import optuna

        if judged is None:
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            return
        for key in ("distance", "utility", "feasible"):
            trial.set_user_attr(key, getattr(judged, key))
        self.study.tell(trial, judged.value)

    def overrides(self, params: Mapping[str, Any]) -> tuple[str, ...]:
        """The overrides of a trial."""
        return (*self.fixed, *(f"{key}={json.dumps(value)}" for key, value in params.items()))

    def best(self) -> tuple[str, ...]:
        """The overrides of the best trial; those given, where every trial failed."""
        import optuna

        finished = (optuna.trial.TrialState.COMPLETE,)
        trials = self.study.get_trials(deepcopy=False, states=finished)
        if not trials:
            return tuple(self.fixed)
        return self.overrides(min(trials, key=lambda trial: (trial.value, trial.number)).params)

    def trials(self) -> list[dict[str, Any]]:
        """All trials, for the report."""
        return [
            {
                "method": self.name,
                "number": trial.number,
                "params": dict(trial.params),
                "distance": trial.user_attrs.get("distance"),
                "utility": trial.user_attrs.get("utility"),
                "feasible": trial.user_attrs.get("feasible"),
                "state": trial.state.name.lower(),
            }
            for trial in self.study.get_trials(deepcopy=False)
        ]

    def _opened(self, number: int) -> Any:
        """The study, with a sampler that depends on the number of the next trial alone."""
        import optuna

        optuna.logging.set_verbosity(logging.WARNING)
        seed = int(digest(self.search["seed"], self.key, number)[:8], 16)
        return optuna.create_study(
            storage=self.storage, study_name=self.key, load_if_exists=True,
            sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=5),
        )  # fmt: skip


def summary(stage: Stage) -> dict[str, Any]:
    """metric -> value, over all suites of an evaluation that is finished."""
    logs = (read_written(Path(stage.evals), kind)[0] for kind in KINDS)
    return {
        name: entry.value
        for log in logs
        for name, entry in log.items()
        if not entry.content.get("not_computed")
    }


def budget(study: Study) -> str:
    """In one sentence, what every method was given."""
    search, aim = study.search, study.search["objective"]
    return (
        f"Every method had {search['trials']} trials on seed {search['seed']}, which is not among "
        f"the seeds reported. A trial is better the closer it comes to gold in "
        f"{', '.join(aim['forget'])}, if it keeps {aim['keep']:.0%} of the target's "
        f"{aim['utility']}."
    )
