"""Find the requests that a model has answered before."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlora.deletion.history import PastRun, SeenBy, seen_by
from unlora.deletion.request_rows import DataSet
from unlora.errors import InputError
from unlora.model.lineage import Lineage, fingerprint
from unlora.runs.safe_loading import read_json

EVIDENCE = Path("saves/requests")  # what a request leaves to be checked
MODELS = Path("saves/forget")  # and its models
KINDS = ("request", "route", "model", "audit")  # of the entries that are read of earlier requests
DAMAGED = "Put its evidence.json back as it was written, or move the folder away."


@dataclass(frozen=True)
class EarlierRequest:
    """A request that was answered on the way to a model.

    Attributes:
        facts: what its evidence says: kind of entry -> content.
    """

    name: str
    facts: Mapping[str, Any]

    @property
    def request(self) -> DataSet:
        """Its rows, where they were."""
        source = self.facts["request"]["source"]
        return DataSet("forget", "request", source["declared"], source["datasets_dir"])

    def rows(self) -> list[dict[str, Any]]:
        """Its rows.

        Raises:
            InputError: they are not there any more.
        """
        return list(self.request.numbered().values())

    def seen_by(self, runs: Sequence[PastRun]) -> list[SeenBy]:
        """Where its rows are in the data of some runs.

        Raises:
            InputError: they are not there any more, so nobody can tell.
        """
        try:
            rows = self.rows()
        except InputError as error:
            raise InputError(
                f"The rows of the earlier request {self.name} cannot be read, and must not come "
                f"back: {error} Put them back."
            ) from error
        return [seen_by(run, self.request, rows) for run in runs]


def read_facts(folder: Path) -> dict[str, Any]:
    """Kind of entry -> content, of an evidence folder that is believed; the last of each kind.

    Raises:
        InputError: it is damaged.
    """
    try:
        entries = read_json(folder / "evidence.json")["entries"]
        facts = {entry["kind"]: entry["content"] for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{str(folder)!r} cannot be read: {error!r}. {DAMAGED}") from error
    if missing := [kind for kind in KINDS if kind not in facts]:
        raise InputError(f"{str(folder)!r} has no entry {missing[0]!r}. {DAMAGED}")
    return facts


def answered(evidence: Path = EVIDENCE) -> Iterator[EarlierRequest]:
    """All requests that have evidence and stand."""
    for file in sorted(evidence.glob("*/evidence.json")):
        facts = read_facts(file.parent)
        if "rolled back" not in facts:
            yield EarlierRequest(file.parent.name, facts)


def earlier_requests(model: str, evidence: Path = EVIDENCE) -> tuple[EarlierRequest, ...]:
    """Those that a model stands on, the first one first."""
    known = {request.name: request for request in answered(evidence)}
    lineage = Lineage.read(model)
    hashes = [link.sha256 for link in lineage.links]
    if lineage.local_root:
        hashes.insert(0, fingerprint(lineage.root))
    names: list[str] = []
    for sha256 in hashes:
        for request in known.values():
            if sha256 in request.facts["model"]["sha256"]:
                names += [*request.facts["model"]["earlier"], request.name]
    return tuple(known[name] for name in dict.fromkeys(names) if name in known)
