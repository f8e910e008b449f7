"""Read and write ``AUDIT.json``: what an audit found, for reports and programs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlora.errors import InputError
from unlora.runs.run import write_json
from unlora.runs.safe_loading import read_mapping

FILE, FOLDER = "AUDIT.json", "audit"
REMEDY = "Was the audit interrupted? Repeat it: unlora audit RUN."
Interval = tuple[float, float] | None


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
        found: Mapping[str, Any] | None = self.content.get("held")
        return found

    @property
    def attacks(self) -> list[Mapping[str, Any]]:
        """Each form of each attack: ``name``, ``attack``, ``residual``, ``interval95``, ..."""
        return list(self.content.get("attacks") or ())

    @property
    def plain(self) -> Mapping[str, Any] | None:
        """What the model knows where it is asked plainly."""
        return next((one for one in self.attacks if one.get("attack") == "plain"), None)


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
    return AuditLog(content)
