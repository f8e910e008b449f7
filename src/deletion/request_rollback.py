"""Roll a request back: drop its link, where nothing stands on it.

unlora rollback ID
"""

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from unlora.deletion.earlier import EVIDENCE, MODELS, read_facts
from unlora.deletion.evidence_chain import FILE, append
from unlora.errors import InputError
from unlora.model.lineage import FILE as LINEAGE
from unlora.runs.atomic_files import files_below
from unlora.runs.run import alone
from unlora.runs.safe_loading import read_json


def run(name: str) -> str:
    """Remove the models of a request, and say so in its evidence.

    Returns:
        What is served again.

    Raises:
        InputError: there is no such request, it is rolled back already, or a model stands on it.
    """
    evidence, home = EVIDENCE / name, MODELS / name
    if not (evidence / FILE).is_file():
        known = sorted(file.parent.name for file in EVIDENCE.glob(f"*/{FILE}"))
        has = f"There are: {', '.join(known)}." if known else "There is none."
        raise InputError(f"There is no request {name!r} under {EVIDENCE}. {has}")
    facts = read_facts(evidence)
    if "rolled back" in facts:
        raise InputError(f"The request {name} was rolled back on {facts['rolled back']['at']}.")
    if above := next(_standing_on(home), None):
        raise InputError(
            f"{str(above)!r} stands on the model of {name}: roll that back first, or remove it."
        )
    before = facts["model"]["before"]
    with alone(home):
        shutil.rmtree(home, ignore_errors=True)
        at = datetime.now(UTC).isoformat(timespec="seconds")
        append(evidence, "rolled back", {"at": at, "serve": before})
    return f"The models of {name} are removed, and its evidence says so. Serve {before}."


def _standing_on(home: Path) -> Iterator[Path]:
    """Folders below ``saves`` whose lineage has a link of a request, and that are not its own."""
    real = home.resolve()
    for file in files_below(MODELS.parent, LINEAGE):
        folder = file.parent.resolve()
        content = read_json(file)
        paths = [content["root"]["path"], *(link["path"] for link in content["links"])]
        links = [(folder / path).resolve() for path in paths]
        if real not in folder.parents and any(real in link.parents for link in links):
            yield file.parent
