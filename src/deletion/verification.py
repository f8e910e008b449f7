"""Verify an evidence folder: hashes, chain, and every figure that its scores give again."""

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unlora.audits.scores import AuditScores, judged
from unlora.audits.verdict import Thresholds
from unlora.deletion.evidence_chain import FIGURES, FILE, REQUEST, as_text, hash_of
from unlora.errors import GuardError, InputError
from unlora.runs.hashes import sha256

CLOSE = 1e-9  # of a figure that another machine computes


def run(folder: str, *, with_model: bool = False) -> str:
    """Check all that can be checked.

    Returns:
        What holds, in a few lines.

    Raises:
        InputError: the folder holds no evidence, or the models are not there.
        GuardError: something was changed; each file is named.
    """
    evidence = Path(folder)
    if not (evidence / FILE).is_file():
        raise InputError(
            f"{folder!r} has no {FILE}. Give a folder: unlora verify saves/requests/ID"
        )
    try:
        wrong = list(_mistakes(evidence))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        wrong = [f"{FILE}: it is not as it was written ({type(error).__name__}: {error})"]
    if wrong:
        raise GuardError("\n".join(wrong))
    entries = json.loads((evidence / FILE).read_text("utf-8"))["entries"]
    facts = {entry["kind"]: entry["content"] for entry in entries}
    lines = [
        f"{len(entries)} entries and {len(facts['files'])} files are as they were written.",
        f"The figures of {1 + len(facts['earlier'])} audits follow from their scores.",
    ]
    if with_model:
        lines.append(_answers(facts, evidence))
    lines += [facts["audit"]["verdict"]["sentence"], f"Its hash: {entries[-1]['sha256']}"]
    return "\n".join(lines)


def _mistakes(folder: Path) -> Iterator[str]:
    text = (folder / FILE).read_bytes()
    entries = json.loads(text)["entries"]
    if as_text(entries).encode() != text:
        yield f"{FILE}: it is not as it was written"
    previous = None
    for number, entry in enumerate(entries):
        body = {key: entry[key] for key in ("kind", "content", "previous")}
        if entry["previous"] != previous or entry["sha256"] != hash_of(body) or len(entry) != 4:
            yield f"{FILE}: entry {number + 1} ({entry['kind']}) was changed"
        previous = entry["sha256"]
    if entries[-1]["kind"] != "files":
        yield f"{FILE}: its end is missing"
    facts = {entry["kind"]: entry["content"] for entry in entries}
    if changed := list(_changed_files(folder, facts["files"])):
        yield from changed
        return
    if json.loads((folder / REQUEST).read_bytes()) != facts["request"]:
        yield f"{REQUEST}: it is not what {FILE} says was asked"
    for audit in (facts["audit"], *facts["earlier"]):
        yield from _other_figures(folder, audit)


def _changed_files(folder: Path, known: Mapping[str, str]) -> Iterator[str]:
    there = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    for name in sorted(there - {FILE} - known.keys()):
        yield f"{name}: it is not part of the evidence"
    for name, hash in known.items():
        if name not in there:
            yield f"{name}: it is missing"
        elif sha256(folder / name) != hash:
            yield f"{name}: it was changed"


def _other_figures(folder: Path, audit: Mapping[str, Any]) -> Iterator[str]:
    """Computes an audit again from its scores."""
    name = audit["scores"]
    scores = AuditScores.from_json(json.loads((folder / name).read_bytes()))
    again = judged(scores, Thresholds(**audit["thresholds"]), audit["baseline"])
    for figure in (*FIGURES, "judged"):
        now = again["verdict" if figure == "judged" else figure]
        if figure in audit and not _same(json.loads(json.dumps(now)), audit[figure]):
            yield f"{name}: {figure} does not follow from it"


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        return value.keys() == other.keys() and all(_same(value[key], other[key]) for key in value)
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(map(_same, value, other))
    if isinstance(value, float):
        if other is None:  # JSON has no NaN
            return not math.isfinite(value)
        return isinstance(other, (int, float)) and math.isclose(value, other, rel_tol=CLOSE)
    return bool(value == other)


def _answers(facts: Mapping[str, Any], folder: Path) -> str:
    """Ask the models again, plainly, and compare every answer's log-probability.

    Raises:
        InputError: a model or the rows are not there any more.
        GuardError: a model says something else than it did.
    """
    from unlora.audits.scores import ROLES
    from unlora.deletion.asked_again import scores_again

    audit = facts["audit"]
    with tempfile.TemporaryDirectory() as temporary:
        now = scores_again(facts, Path(temporary))
    then = AuditScores.from_json(json.loads((folder / audit["scores"]).read_bytes()))
    far = 0.0
    for role in ROLES:
        for logp, other in zip(now.logps["forget"][role], then.logps["forget"][role], strict=True):
            far = max(far, abs(logp - other)) if math.isfinite(logp - other) else far
    if far > 1e-3:
        raise GuardError(
            f"{audit['scores']}: the models give the answers a log-probability that differs by up "
            f"to {far:.2g}. They are not those of the evidence, or run on other packages."
        )
    return f"The models give the same answers (log-probabilities differ by up to {far:.1g})."
