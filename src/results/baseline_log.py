"""Read the logs of the models that an evaluation compares with: retain model and target."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unlora.errors import InputError
from unlora.registry import unknown
from unlora.results.eval_log import EvalLog, read_log
from unlora.results.value import Value

# what stands in a log and not in an evaluation -> the key of the config that names the log
KEYS = {"reference": "retain_logs_path", "target": "target_logs_path"}
WHAT = {"retain_logs_path": "the retain model's", "target_logs_path": "the target's"}
WHOSE = {
    "retain_logs_path": "a model that never saw the forget data",
    "target_logs_path": "the model before it was made to forget",
}


def find_log(path: str | Path, kind: str, key: str = "retain_logs_path") -> Path:
    """The log file that a path stands for: the file itself, or the one of a run folder.

    Args:
        key: of the config, for the message.

    Raises:
        InputError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    candidates = (path / "evals" / f"{kind}_EVAL.json", path / f"{kind}_EVAL.json")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise InputError(
        f"{key} {str(path)!r} is not there. Give the {kind}_EVAL.json of {WHOSE[key]}, or the run "
        "folder that holds it."
        if not path.exists()
        else f"{key} {str(path)!r} holds no {kind}_EVAL.json, neither directly nor in evals/. "
        "Evaluate that model first, or give another folder."
    )


class BaselineLog:
    """The log of another model: the one without the forget data, or the one before unlearning.

    Args:
        path: log file or run folder; None when there is no such model.
        key: of the config, for messages.
        advice: how to come by a log that is missing.
        missed: False where nobody expects one, as of a model that is a reference itself.

    Raises:
        InputError: it is not there, or it is no log.
    """

    def __init__(
        self,
        path: str | Path | None,
        kind: str,
        key: str = "retain_logs_path",
        advice: str | None = None,
        missed: bool = True,
    ):
        self.kind, self.key, self.advice, self.missed = kind, key, advice, missed
        self.file = find_log(path, kind, key) if path else None
        other = re.fullmatch(r"([A-Za-z]+)_EVAL\.json", self.file.name) if self.file else None
        if other and other[1] != kind:
            raise InputError(
                f"{key} {str(self.file)!r} is a log of {other[1]}, and this evaluation is of "
                f"{kind}. Give the {kind}_EVAL.json of {WHOSE[key]}."
            )
        self.entries: EvalLog = (
            read_log(self.file, key=key, remedy=f"Give a {kind}_EVAL.json.") if self.file else {}
        )

    @classmethod
    def of(cls, which: str, config: Mapping[str, Any], kind: str) -> "BaselineLog":
        """The log that a suite's config names for ``reference`` or ``target``.

        A path that is still to be found (``auto``, or a model) stands for no log.
        """
        key = KEYS[which]
        value = config.get(key)
        if isinstance(value, Mapping):  # nothing was found for it
            return cls(None, kind, key, value["advice"], value.get("missed", True))
        return cls(value, kind, key)

    def value(self, name: str) -> Value:
        """The retain model's value of a metric, or why there is none."""
        if self.file is None:
            advice = self.advice or (
                f"Evaluate {WHOSE[self.key]} and give its {self.kind}_EVAL.json as {self.key}"
            )
            return Value.missing(f"{WHAT[self.key]} log is missing. {advice}")
        if name not in self.entries:
            return Value.missing(
                f"the log {self.file} has no entry {name}. {unknown('metric', name, self.entries)}"
            )
        entry = self.entries[name]
        if entry.content.get("agg_value") is None:
            return Value.missing(f"the log {self.file} has no value for {name}")
        return entry.as_value()

    def values(self) -> dict[str, Value]:
        """Every metric that the log has a value of."""
        values = {name: self.value(name) for name in self.entries}
        return {name: value for name, value in values.items() if not value.not_computed}
