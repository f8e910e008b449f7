"""Show what ran: settings, where each model comes from, versions, machine, time."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unlora.report.runs import Result, Row

# they differ between any two runs and say nothing of a method
_OWN = (
    "paths.", "task_name", "eval.", "trainer.args.seed", "trainer.args.output_dir", "seed",
    "retain_logs_path", "trainer.args.logging_dir", "model.tokenizer_args.pretrained",
)  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """One run, for a table of runs.

    Attributes:
        lineage: root model, then every adapter on it: (path, hash).
        config: the resolved config as text; secrets were hidden when it was written.
    """

    name: str
    role: str
    seed: str
    folder: str
    values: Mapping[str, str]
    lineage: tuple[tuple[str, str], ...]
    command: str
    config: str


def facts(rows: Sequence[Row]) -> list[Facts]:
    """What every run was: its command, commit, seeds and times."""
    return [_facts(row, result) for row in rows for result in row.results]


def differences(rows: Sequence[Row]) -> tuple[list[str], dict[str, dict[str, str]]]:
    """The settings that are not the same in all methods: names, key -> name -> value."""
    flat = {row.name: _flat(row.results[0].run.config) for row in rows if row.role == "method"}
    flat = {name: settings for name, settings in flat.items() if settings}
    if len(flat) < 2:
        return [], {}
    keys = sorted({key for settings in flat.values() for key in settings})
    table = {
        key: {name: settings.get(key, "") for name, settings in flat.items()}
        for key in keys
        if not key.startswith(_OWN) and len({s.get(key, "") for s in flat.values()}) > 1
    }
    return list(flat), table


def versions(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Every package with the version(s) that the runs were made with; commit and machine, too."""
    by_package: dict[str, dict[str, None]] = {}
    for result in (result for row in rows for result in row.results):
        manifest = result.run.manifest
        named = manifest.get("versions")
        named = named if isinstance(named, Mapping) else {}
        more = {"python": manifest.get("python"), "commit": manifest.get("git_commit"),
                "hardware": _hardware(manifest.get("hardware"))}  # fmt: skip
        for name, version in {**named, **more}.items():
            if version:
                by_package.setdefault(str(name), {})[str(version)] = None
    return [(name, ", ".join(sorted(values))) for name, values in by_package.items()]


def _facts(row: Row, result: Result) -> Facts:
    manifest = result.run.manifest
    effective, steps = manifest.get("effective_batch"), manifest.get("optimiser_steps")
    values = {
        "time": _duration(manifest.get("seconds")),
        "peak memory": _memory(manifest.get("peak_memory_bytes")),
        "effective batch": "" if effective is None else str(effective),
        "steps": "" if steps is None else str(steps),
        "size": str(manifest.get("size") or ""),
    }
    config = result.run.config
    return Facts(
        row.name,
        row.role,
        "" if result.entry.seed is None else str(result.entry.seed),
        str(result.entry.folder),
        values,
        result.run.lineage,
        str(manifest.get("command") or ""),
        json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False, default=str)
        if config
        else "",
    )


def _flat(content: Any, above: str = "") -> dict[str, str]:
    if not isinstance(content, Mapping):
        return {above.removesuffix("."): json.dumps(content, ensure_ascii=False, default=str)}
    flat: dict[str, str] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{above}{key}.")
    return flat


def _hardware(hardware: Any) -> str:
    if not isinstance(hardware, Mapping):
        return ""
    gpus = hardware.get("gpus") or []
    cores = hardware.get("cores")
    parts = [*map(str, gpus), str(hardware.get("machine") or ""), f"{cores} cores" if cores else ""]
    return ", ".join(part for part in parts if part)


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, (int, float)):
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )


def _memory(peaks: Any) -> str:
    if not isinstance(peaks, Mapping):
        return ""
    known = {k: v for k, v in peaks.items() if isinstance(v, (int, float))}
    return ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in known.items())
