"""Plan the exact route: train again what saw the rows, without them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unlora.deletion.history import PARTS, PastRun, SeenBy, peak_memory
from unlora.errors import InputError
from unlora.recipes.run_history import start_of


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
        """By what the run took, and how many of its rows are left."""
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
        """Of all of them."""
        times = [again.seconds for again in self.retrainings]
        return None if None in times else sum(filter(None, times))

    @property
    def memory(self) -> int | None:
        """Bytes at the highest peak that its runs had."""
        return peak_memory(again.run for again in self.retrainings)


def exact_route(seen: Sequence[SeenBy], earlier: Sequence[Sequence[SeenBy]]) -> ExactRoute:
    """What has to be trained again.

    Args:
        seen: of every run of the lineage, the rows of this request.
        earlier: the same for each earlier request, whose rows must not come back.

    Raises:
        InputError: it cannot be done, and why.
    """
    _refuse_unseen(seen)
    retrainings: list[Retraining] = []
    dropped: list[PastRun] = []
    start = ""
    for number, rows in enumerate(seen):
        away = [rows, *(others[number] for others in earlier)]
        again = _without(rows.run, away)
        if not (again is None or again.removed or retrainings or dropped):
            continue  # it saw none of them, nor does it stand on what did
        if not start:
            start = start_of(rows.run.folder, rows.run.config)
        if again is None:
            dropped.append(rows.run)
        else:
            _refuse_unrepeatable(rows.run)
            retrainings.append(again)
    if not retrainings:
        raise InputError(
            f"All rows that were trained on are in the request: the model without them is "
            f"{start!r}. Serve that."
        )
    return ExactRoute(start, tuple(retrainings), tuple(dropped))


def _refuse_unseen(seen: Sequence[SeenBy]) -> None:
    """Raise InputError where no run saw the rows, or the data of one are gone."""
    for rows in seen:
        if rows.unreadable:
            raise InputError(
                f"The data of {str(rows.run.folder)!r} cannot be read: {rows.unreadable} So it "
                "cannot be trained again. Put the data back, or give --route approximate."
            )
    if not any(rows.learnt for rows in seen):
        raise InputError(
            "No training of this model saw these rows: only the root model could know them, and "
            "that cannot be trained again here. To unlearn them all the same, give --route "
            "approximate."
        )


def _without(run: PastRun, away: Sequence[SeenBy]) -> Retraining | None:
    """A run without the rows that were found in it; None where it has nothing left to forget.

    Raises:
        InputError: nothing is left to train on, or its rows belong together in a way that we do
            not take apart.
    """
    numbers: dict[tuple[str, str], set[int]] = {}
    for run_rows in away:
        for key, rows in run_rows.exact.items():
            numbers.setdefault(key, set()).update(rows)
    data: dict[str, Any] = {**run.config["data"]}
    removed = left = 0
    for part in PARTS:
        sets = [data_set for data_set in run.sets if data_set.part == part]
        rest = {}
        for data_set in sets:
            gone, all_rows = numbers.get((part, data_set.name), set()), len(data_set.numbered())
            removed, left = removed + len(gone), left + all_rows - len(gone)
            if len(gone) < all_rows:
                rest[data_set.name] = data_set.without_rows(sorted(gone)).declared
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
