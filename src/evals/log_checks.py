"""Check that the log of another model was made on the data of this evaluation."""

from collections.abc import Mapping, Sequence

from unlora.errors import InputError
from unlora.evals.datasets import Source
from unlora.evals.pass_plan import LOGS, Request, needed, questions
from unlora.results.baseline_log import BaselineLog


def check_logs(
    requests: Sequence[Request],
    logs: Mapping[str, BaselineLog],
    sources: Mapping[str, Source],
    missing: Mapping[str, str],
) -> None:
    """Refuse logs that were made on other data, by their row counts and their true answers.

    Args:
        logs: ``reference`` and ``target``.
        missing: the data sets that are not there.

    Raises:
        InputError: the counts differ, or fewer than half of the forget answers are in a log.
    """
    for request in requests:
        _check_count(request, requests, logs, sources)
        name = dict(request.sources()).get("generate", "")
        if not request.handler.startswith("rouge") or not name.startswith("forget"):
            continue
        if name not in missing and sources[name].is_qa:  # text is cut by its tokenizer
            for log in logs.values():
                _check_texts(log, request.name, name, sources[name].references)


def _check_count(
    request: Request,
    requests: Sequence[Request],
    logs: Mapping[str, BaselineLog],
    sources: Mapping[str, Source],
) -> None:
    for kind, name in request.sources():
        rows = logs[kind].value(name).per_example if kind in LOGS else None
        if isinstance(rows, Mapping):
            rows = rows.get("forget")
        if not rows:
            continue
        below = needed(requests, [request.name])
        sizes = {len(sources[s]) for _, s in questions(below)}
        if len(rows) not in sizes:
            raise InputError(
                f"the log {logs[kind].file} has {len(rows)} rows for {name}, this evaluation "
                f"{max(sizes)}: it was made on other data. Give a log of the same forget_split."
            )


def _check_texts(log: BaselineLog, metric: str, name: str, references: Sequence[str]) -> None:
    rows = log.value(metric).per_example
    if not rows or isinstance(rows, Mapping):
        return
    theirs = {_plain(row["ground_truth"]) for row in rows if row.get("ground_truth")}
    ours = [_plain(text) for text in references]
    known = sum(text in theirs for text in ours)
    if theirs and 2 * known < len(ours):
        lost = next(text for text in ours if text not in theirs)
        raise InputError(
            f"the log {log.file} has {known} of the {len(ours)} answers of {name}, and not e.g. "
            f"{lost[:80]!r}: it was made on other data. Evaluate that model on these data, or give "
            "another log."
        )


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
