"""Read, write and show ``AUDIT.json``: what an audit found, for reports and programs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlora.errors import InputError
from unlora.runs.atomic_files import write_json
from unlora.runs.safe_loading import read_mapping

FILE, FOLDER = "AUDIT.json", "audit"
SCORES = "AUDIT_SCORES.json"  # of every row, from which the figures can be computed again
REMEDY = "Was the audit interrupted? Repeat it: unlora audit RUN."
Interval = tuple[float, float] | None
_TRAINED = re.compile(r".*: learning rate (\d+(?:\.\d+)?(?:e[+-]?\d+)?), step (\d+)")


@dataclass(frozen=True)
class AuditLog:
    """What an audit found.

    Attributes:
        content: as the file has it.
    """

    content: Mapping[str, Any]

    @property
    def verdict(self) -> str:
        """``held``, ``known``, ``hidden``, ``over-forgotten``, ``broken``, or why there is none."""
        return str(self.content["verdict"]["name"])

    @property
    def sentence(self) -> str:
        """The verdict for people who know none of the attacks."""
        return str(self.content["verdict"]["sentence"])

    @property
    def held(self) -> Mapping[str, Any] | None:
        """``value``, ``interval95``, ``worst`` and ``forms`` of the largest residual."""
        bound: Mapping[str, Any] | None = self.content.get("held")
        return bound

    @property
    def attacks(self) -> list[Mapping[str, Any]]:
        """Each form of each attack: ``name``, ``attack``, ``residual``, ``interval95``, ..."""
        return list(self.content.get("attacks") or ())

    @property
    def plain(self) -> Mapping[str, Any] | None:
        """What the model knows where it is asked plainly."""
        return next((form for form in self.attacks if form.get("attack") == "plain"), None)

    @property
    def not_run(self) -> Mapping[str, str]:
        """Attack -> why it could not be run."""
        reasons = self.content.get("not_run")
        return {str(k): str(v) for k, v in reasons.items()} if isinstance(reasons, Mapping) else {}

    @property
    def trainings(self) -> dict[tuple[str, float], dict[int, Mapping[str, Any]]]:
        """(attack, learning rate) -> step -> form, of the attacks that train the model shortly."""
        trainings: dict[tuple[str, float], dict[int, Mapping[str, Any]]] = {}
        for form in self.attacks:
            if match := _TRAINED.fullmatch(form["name"]):
                key = form["attack"], float(match[1])
                trainings.setdefault(key, {})[int(match[2])] = form
        return trainings


def write_audit(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write ``AUDIT.json`` into a folder."""
    write_json(folder / FILE, content)
    return folder / FILE


def read_audit(run: str | Path) -> AuditLog | None:
    """The audit of a run folder; None where there is none.

    Raises:
        InputError: the file is damaged.
    """
    file = next((f for f in (Path(run, FOLDER, FILE), Path(run, FILE)) if f.is_file()), None)
    if file is None:
        return None
    content = read_mapping(file, remedy=REMEDY)
    verdict = content.get("verdict")
    if not isinstance(verdict, Mapping) or not {"name", "sentence"} <= set(verdict):
        raise InputError(f"{str(file)!r} holds no verdict. {REMEDY}")
    attacks = content.get("attacks")
    if not isinstance(attacks, list) or not attacks:
        raise InputError(f"{str(file)!r} holds a verdict and no attacks. {REMEDY}")
    held = content.get("held")
    for i, form in enumerate(attacks):
        if not _is_figure(form, "residual") or not _is_text(form, "name", "attack"):
            raise InputError(f"{str(file)!r}: attack {i + 1} is damaged. {REMEDY}")
    if held is not None and not _is_figure(held, "value"):
        raise InputError(f"{str(file)!r}: its largest residual (held) is damaged. {REMEDY}")
    return AuditLog(content)


def _is_text(form: Mapping[str, Any], *keys: str) -> bool:
    return all(isinstance(form.get(key), str) for key in keys)


def _is_figure(entry: Any, key: str) -> bool:
    """Whether it has a number, or null, and an interval of two numbers, or null."""
    if not isinstance(entry, Mapping) or key not in entry:
        return False
    bounds = entry.get("interval95")
    bounds = (0, 0) if bounds is None else bounds
    return (
        isinstance(bounds, (list, tuple))
        and len(bounds) == 2
        and all(isinstance(number, (int, float)) for number in bounds)
        and isinstance(entry[key], (int, float, type(None)))
    )


def as_text(content: Mapping[str, Any]) -> str:
    """A line for each form of an attack, and the verdict."""
    show = "{:44} {:>9} {:>18}  {}".format
    after = content.get("retain_probability_after") or {}
    lines = [show("attack", "residual", "95 %", "")]
    for row in content["attacks"]:
        value, bounds = row["residual"], row["interval95"]
        interval = "[{:.2f}, {:.2f}]".format(*bounds) if bounds else ""
        note = "" if row["counts"] else "only where the adapter is delivered"
        if row["name"] in after:
            note = f"retain answers {after[row['name']]:.3f}"
        if row["left_out"]:
            note = f"left out: {row['left_out']}"
        lines.append(show(row["name"], f"{value:.2f}", interval, note).rstrip())
    lines += [f"{name}: not run: {why}" for name, why in content["not_run"].items()]
    limits = ", ".join(f"{key} {value:g}" for key, value in content["thresholds"].items())
    return "\n".join([*lines, "", content["verdict"]["sentence"], f"(thresholds: {limits})"])
