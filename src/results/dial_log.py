"""Read ``DIAL.json``, and show it: what scaling a run's unlearning adapter comes to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from unlora.errors import InputError
from unlora.results.audit_log import FOLDER
from unlora.runs.safe_loading import read_mapping

FILE = "DIAL.json"
REMEDY = "Was it interrupted? Repeat it: unlora dial RUN."


@dataclass(frozen=True)
class DialLog:
    """What was found by turning an adapter.

    Attributes:
        content: as the file has it.
    """

    content: Mapping[str, Any]

    @property
    def scale(self) -> float | None:
        """The scale that does what was asked for; None where no scale does it."""
        scale = self.content.get("scale")
        return None if scale is None else float(scale)

    @property
    def reached(self) -> bool:
        """Whether some scale does what was asked for; a study keeps the adapter as it is else."""
        return self.scale is not None and bool(self.content.get("reached", True))

    @property
    def curve(self) -> list[tuple[float, float, float]]:
        """(scale, residual, retain probability) of the scales at which both are known."""
        keys = ("scale", "residual", "retain")
        points = [tuple(point.get(key) for key in keys) for point in self.content["curve"]]
        return sorted(point for point in points if None not in point)

    @property
    def chosen(self) -> tuple[float, float] | None:
        """Residual and retain probability at the scale, between those of its neighbours."""
        scale, curve = self.scale, self.curve
        for (low, *left), (high, *right) in pairwise(curve):
            if scale is not None and low <= scale <= high:
                share = (scale - low) / (high - low)
                residual, retain = (a + share * (b - a) for a, b in zip(left, right, strict=True))
                return residual, retain
        return None


def read_dial(run: str | Path) -> DialLog | None:
    """What turning the adapter of a run folder came to; None where nobody did.

    Raises:
        InputError: the file is damaged.
    """
    file = Path(run, FOLDER, FILE)
    if not file.is_file():
        return None
    content = read_mapping(file, remedy=REMEDY)
    curve = content.get("curve")
    number = (int, float, type(None))
    if not isinstance(curve, list) or not all(
        isinstance(p, Mapping)
        and all(isinstance(p.get(key), number) for key in ("scale", "residual", "retain"))
        for p in curve
    ):
        raise InputError(f"{str(file)!r} holds no curve of scales. {REMEDY}")
    if not isinstance(content.get("scale"), number):
        raise InputError(f"{str(file)!r}: its scale is no number. {REMEDY}")
    verdict = content.get("verdict")
    if verdict is not None and not (isinstance(verdict, Mapping) and "sentence" in verdict):
        raise InputError(f"{str(file)!r}: its verdict has no sentence. {REMEDY}")
    return DialLog(content)


def as_text(content: Mapping[str, Any]) -> str:
    """The curve, and what was chosen."""
    show = "{:>6} {:>9} {:>8} {:>8}".format
    lines = [show("scale", "residual", "retain", "holdout")]
    lines += [_line(show, point) for point in content["curve"]]
    lines += _audited_lines(content["audits"])
    if content["run"]:
        lines.append(f"\nThe model at scale {content['scale']:.2f} is in {content['run']}")
        if content["verdict"]:
            lines.append(content["verdict"]["sentence"])
    else:
        lines.append(
            f"\nNo scale from 0 to {content['curve'][-1]['scale']} does it (--to {content['to']}). "
            "Nothing was written."
        )
    return "\n".join(lines)


def _line(show: Any, point: Mapping[str, Any]) -> str:
    retain, holdout = (
        "" if point[name] is None else f"{point[name]:.3f}" for name in ("retain", "holdout")
    )
    return str(show(f"{point['scale']:.2f}", f"{point['residual']:.2f}", retain, holdout)).rstrip()


def _audited_lines(audits: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for audit in audits:
        held = audit["held"]
        bounds = "" if not held else " {:.2f} [{:.2f}, {:.2f}]".format(
            held["value"], *held["interval95"]
        )  # fmt: skip
        which = audit["attacks"] if audit["attacks"] == "all" else ", ".join(audit["attacks"])
        verdict = audit["verdict"]["name"]
        lines.append(f"audit at {audit['scale']:.2f} ({which}): HELD{bounds}: {verdict}")
    return lines
