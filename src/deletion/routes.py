"""Plan the routes of a deletion request, with what each would cost by what its runs measured."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from unlora.cli.compose import composed
from unlora.config.resolve import plain
from unlora.deletion.history import LEARNT, PARTS, PastRun, SeenBy
from unlora.deletion.rows import DataSet
from unlora.errors import InputError
from unlora.recipes.baselines.retain_model import start_of
from unlora.studies.dry_run import num_steps
from unlora.trainer import UnlearningLoss

EXPERIMENT = "experiment=unlearn/request/lora"
LAYOUT = ("per_device_train_batch_size", "gradient_accumulation_steps")
FORWARD = 1 / 3  # of a forward and backward pass


@dataclass(frozen=True)
class Retraining:
    """A run that is trained again without some of its rows.

    Attributes:
        data: the section of its config.
        removed, left: rows of one epoch.
        seconds: None where the run does not say how long it took.
    """

    run: PastRun
    data: Mapping[str, Any]
    removed: int
    left: int

    @property
    def seconds(self) -> float | None:
        total = self.removed + self.left
        return self.run.seconds * self.left / total if self.run.seconds and total else None


@dataclass(frozen=True)
class ExactRoute:
    """Train again what saw the rows, and what stands on it.

    Attributes:
        start: the model that the first of them starts from.
        dropped: links whose forget rows were never seen now.
    """

    start: str
    retrainings: tuple[Retraining, ...]
    dropped: tuple[PastRun, ...] = ()

    @property
    def seconds(self) -> float | None:
        times = [one.seconds for one in self.retrainings]
        return None if None in times else sum(filter(None, times))

    @property
    def memory(self) -> int | None:
        return _peak(one.run for one in self.retrainings)


@dataclass(frozen=True)
class ApproximateRoute:
    """Unlearn the rows on top of the model.

    Attributes:
        overrides: of the config ``unlearn``, as a user types them.
        params: key of that config -> value, beneath the user's.
        like: the run whose settings it takes over.
        retain: what is to be kept, as it was trained on.
        training_seconds: None where the run does not say how long it took.
    """

    method: str
    overrides: tuple[str, ...]
    params: Mapping[str, Any]
    like: PastRun
    retain: tuple[DataSet, ...]
    steps: int
    training_seconds: float | None
    checking_seconds: float | None = field(default=None)

    @property
    def seconds(self) -> float | None:
        if self.training_seconds is None or self.checking_seconds is None:
            return None
        return self.training_seconds + self.checking_seconds

    @property
    def memory(self) -> int | None:
        return _peak([self.like])


def exact_route(seen: Sequence[SeenBy], earlier: Sequence[Sequence[SeenBy]]) -> ExactRoute:
    """What has to be trained again.

    Args:
        seen: of every run of the lineage, the rows of this request.
        earlier: the same for each earlier request, whose rows must not come back.

    Raises:
        InputError: it cannot be done, and why.
    """
    for one in seen:
        if one.unreadable:
            raise InputError(
                f"The data of {str(one.run.folder)!r} cannot be read: {one.unreadable} So nobody "
                "can tell what it saw. Put the data back, or give --route approximate."
            )
    if not any(one.learnt for one in seen):
        raise InputError(
            "No training of this model saw these rows: only the root model could know them, and "
            "that cannot be trained again here. To unlearn them all the same, give --route "
            "approximate."
        )
    retrainings, dropped, start = [], [], ""
    for number, one in enumerate(seen):
        away = [one, *(rows[number] for rows in earlier)]
        again = _without(one.run, away)
        if not (again is None or again.removed or retrainings or dropped):
            continue  # it saw none of them, nor does it stand on what did
        if not start:
            start = start_of(one.run.folder, one.run.config)
        if again is None:
            dropped.append(one.run)
        else:
            _refuse_unrepeatable(one.run)
            retrainings.append(again)
    if not retrainings:
        raise InputError(
            f"All rows that were trained on are in the request: the model without them is "
            f"{start!r}. Serve that."
        )
    return ExactRoute(start, tuple(retrainings), tuple(dropped))


def approximate_route(
    seen: Sequence[SeenBy],
    earlier: Sequence[Sequence[SeenBy]],
    request: DataSet,
    num_rows: int,
    method: str,
    words: Sequence[str],
    retain: DataSet | None,
) -> ApproximateRoute:
    """What would be unlearned on top.

    Args:
        words: overrides of the user's.
        retain: what is to be kept, where it is not the run's own rows without the request.

    Raises:
        InputError: there is no such method, nothing is left to retain, or a word is wrong.
    """
    like = _like(seen)
    kept = (retain,) if retain else tuple(_left_of(like, seen, earlier))
    sets = {f"retain{number or ''}": one.declared for number, one in enumerate(kept)}
    limit = {k: v for k, v in _first_args(like).items() if k == "max_length"}
    forget = {**request.declared, "args": {**limit, **request.declared["args"]}}
    overrides = (EXPERIMENT, f"trainer={method}", *words)
    cfg = composed("unlearn", overrides)
    typed = {word.lstrip("+").partition("=")[0] for word in words}
    params: dict[str, Any] = {
        "data.forget": {"request": forget},
        "data.retain": sets,
        **{key: value for key, value in _as_trained(like).items() if key not in typed},
    }
    args = {**cfg.trainer.args, **_args_of(params)}
    loss = UnlearningLoss.build(cfg.trainer.handler, **plain(cfg.trainer.method_args))
    if "retain" in loss.parts and not sets:
        raise InputError(
            "No retain rows are left: the request holds all that the model was trained on. Give "
            "rows that must stay: --retain FILE"
        )
    steps = num_steps(args, num_rows)
    return ApproximateRoute(
        method, overrides, params, like, kept, steps, _seconds(like, loss, args, steps, num_rows)
    )


def _seconds(
    like: PastRun, loss: UnlearningLoss, args: Mapping[str, Any], steps: int, rows: int
) -> float | None:
    if like.seconds_per_row is None:
        return None
    per_epoch = rows * len([view for view in loss.views if view.startswith("policy_")])
    asked = rows * len(loss.asked_of_reference()) * FORWARD  # once
    epochs = float(args.get("num_train_epochs", 3))
    if args.get("max_steps", -1) > 0:
        epochs = steps / max(1, num_steps({**args, "max_steps": -1, "num_train_epochs": 1}, rows))
    return float(like.seconds_per_row * (per_epoch * epochs + asked))


def _without(run: PastRun, away: Sequence[SeenBy]) -> Retraining | None:
    """A run without the rows that were found in it; None where it has nothing left to forget.

    Raises:
        InputError: nothing is left to train on, or its rows belong together in a way that we do
            not take apart.
    """
    numbers: dict[tuple[str, str], set[int]] = {}
    for one in away:
        for key, rows in one.exact.items():
            numbers.setdefault(key, set()).update(rows)
    data: dict[str, Any] = {**run.config["data"]}
    removed = left = 0
    for part in PARTS:
        sets = [one for one in run.sets if one.part == part]
        rest = {}
        for one in sets:
            gone, all_rows = numbers.get((part, one.name), set()), len(one.numbered())
            removed, left = removed + len(gone), left + all_rows - len(gone)
            if len(gone) < all_rows:
                rest[one.name] = one.without_rows(sorted(gone)).declared
        if sets and not rest:
            if part == "forget":
                return None
            raise InputError(
                f"All rows of {part} of {str(run.folder)!r} are in the request: nothing is left "
                "to train it on."
            )
        if sets:
            data[part] = rest
    if data.get("alternate") and any(part == "forget" for part, _ in numbers):
        raise InputError(
            f"{str(run.folder)!r} was trained on other answers to its forget rows, one for each: "
            "some of them cannot be taken out. Give --route approximate."
        )
    return Retraining(run, data, removed, left)


def _refuse_unrepeatable(run: PastRun) -> None:
    if run.is_scaled:
        raise InputError(
            f"{str(run.folder)!r} was not trained but dialled, which is not repeated. Give --route "
            "approximate, or --model with the run it was made from."
        )
    run.refuse_changed_data()


def _like(seen: Sequence[SeenBy]) -> PastRun:
    """The last fine-tuning that saw the rows; without one, the last fine-tuning, or training."""
    tuned = [one for one in seen if one.run.config.get("mode") == "finetune"]
    of_rows = [one for one in tuned if one.learnt]
    return (of_rows or tuned or list(seen))[-1].run


def _left_of(
    run: PastRun, seen: Sequence[SeenBy], earlier: Sequence[Sequence[SeenBy]]
) -> Iterator[DataSet]:
    """What a run was taught, without the rows of all requests."""
    place = [one.run for one in seen].index(run)
    away = [seen[place], *(rows[place] for rows in earlier)]
    if unreadable := seen[place].unreadable:
        raise InputError(
            f"The data of {str(run.folder)!r} cannot be read: {unreadable} So what is to be kept "
            "is not known. Put the data back, or give rows that must stay: --retain FILE"
        )
    for one in run.sets:
        if one.part in LEARNT and one.part != "alternate":
            kinds = [kind for other in away for kind in (other.exact, other.near)]
            numbers = {n for kind in kinds for n in kind.get((one.part, one.name), ())}
            if len(numbers) < len(one.numbered()):
                yield replace(one.without_rows(sorted(numbers)), part="retain")


def _as_trained(run: PastRun) -> dict[str, Any]:
    """What an unlearning takes over of the run that saw the rows."""
    args, model = run.config["trainer"]["args"], run.config["model"]
    params = {f"trainer.args.{key}": args[key] for key in LAYOUT if key in args}
    if run.config.get("global_batch_size"):
        params["global_batch_size"] = run.config["global_batch_size"]
    if model.get("use_lora"):
        params |= {f"model.lora_config.{key}": v for key, v in model["lora_config"].items()}
        if "learning_rate" in args:
            params["trainer.args.learning_rate"] = args["learning_rate"] / 2
    if place := (run.config.get("paths") or {}).get("datasets_dir"):
        params["paths.datasets_dir"] = place
    for key in ("gradient_checkpointing", "weight_decay"):
        if key in args:
            params[f"trainer.args.{key}"] = args[key]
    return params


def _args_of(params: Mapping[str, Any]) -> dict[str, Any]:
    start = "trainer.args."
    return {key.removeprefix(start): v for key, v in params.items() if key.startswith(start)}


def _first_args(run: PastRun) -> Mapping[str, Any]:
    args: Mapping[str, Any] = run.sets[0].declared["args"] if run.sets else {}
    return args


def _peak(runs: Any) -> int | None:
    """The highest peak of the runs, of a GPU where they had one."""
    peaks = [max((v for k, v in run.memory.items() if k != "cpu"), default=run.memory.get("cpu"))
             for run in runs]  # fmt: skip
    return max((peak for peak in peaks if peak), default=None)
