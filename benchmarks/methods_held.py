"""Whether methods hold, before and after the dial: the table of ``docs/methods.md`` about attacks.

    unlora study experiment=study/pocket/methods audit_seeds=3
    python benchmarks/methods_held.py saves/study/methods
    python benchmarks/methods_held.py saves/study/smollm2 --output docs/table.md

Prints the table of a study whose methods were audited and dialled, and keeps it in
``results/methods_held.md``, from where ``methods.py`` takes it into the page. A figure is the mean
of the seeds that were audited; beside it stand the least lower and the greatest upper bound of
theirs, and verdicts are counted.
"""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from unlora.results.audit_log import AuditLog, read_audit
from unlora.results.dial_log import DialLog, read_dial
from unlora.results.run_result import read_run

KEPT = Path(__file__).parent / "results" / "methods_held.md"
HEADINGS = (
    "method", "residual", "HELD", "worst attack", "verdict", "utility",
    "scale", "residual dialled", "HELD dialled", "worst attack dialled", "verdict dialled",
    "utility dialled",
)  # fmt: skip
AT_ODDS = 0.1  # of what was known: beyond it a dialled model is not at equal forgetting


def table(study: Path) -> str:
    """The methods of all seeds, those of the highest utility at equal forgetting first."""
    seeds = sorted(study.glob("seed*"))
    names = {run.name for seed in seeds for run in seed.iterdir() if read_audit(run) is not None}
    names -= {"target", "gold"}  # somebody may have attacked them, too
    rows = [_row(seeds, name) for name in sorted(names) if not name.endswith("-dialled")]
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
    for _, cells in sorted(rows, key=lambda row: row[0]):
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _row(seeds: Sequence[Path], name: str) -> tuple[tuple[bool, float], list[str]]:
    """Where a method stands in the order, and its cells."""
    runs = [seed / name for seed in seeds if read_audit(seed / name) is not None]
    dialled = [run.with_name(f"{name}-dialled") for run in runs]
    before, after = ([log for run in of if (log := read_audit(run))] for of in (runs, dialled))
    dials = [dial for run in runs if (dial := read_dial(run)) is not None]
    utility, cells = _utility(runs), [name, *_figures(before)]
    if len(dials) < len(runs) or len(after) < len(runs):
        return (True, -(utility or 0.0)), [*cells, number(utility), "not yet", *5 * "-"]
    if not all(dial.reached for dial in dials):
        missed = f"none does in {sum(not dial.reached for dial in dials)} of {len(runs)} seeds"
        missed = "none does" if len(runs) == 1 else missed
        return (True, -(utility or 0.0)), [*cells, number(utility), missed, *5 * "-"]
    cells += [number(utility), _scales(dials)]
    utility = _utility(dialled)
    cells += [*_figures(after), number(utility)]
    equal = all(abs((log.plain or {}).get("residual") or 0.0) <= AT_ODDS for log in after)
    return (not equal, -(utility or 0.0)), cells


def _figures(logs: Sequence[AuditLog]) -> list[str]:
    """Residual, HELD, the worst attack and the verdict."""
    worst = [str((log.held or {}).get("worst", "-")) for log in logs]
    return [
        interval([log.plain or {} for log in logs], "residual"),
        interval([log.held or {} for log in logs], "value"),
        counted(worst),
        counted([str(log.verdict) for log in logs]),
    ]


def _scales(dials: Sequence[DialLog]) -> str:
    scales = sorted({f"{dial.scale:.2f}" for dial in dials})
    return scales[0] if len(scales) == 1 else f"{scales[0]} to {scales[-1]}"


def _utility(runs: Sequence[Path]) -> float | None:
    values = [read_run(run).entry("TOFU", "model_utility").value for run in runs]
    return None if None in values else mean(value for value in values if value is not None)


def counted(words: Sequence[str]) -> str:
    """What was found in how many seeds, the most frequent first; the word alone if in all."""
    found = Counter(words).most_common()
    return found[0][0] if len(found) == 1 else ", ".join(f"{n} {word}" for word, n in found)


def interval(of: Sequence[Mapping[str, Any]], key: str) -> str:
    """The mean of a figure, with the outermost bounds."""
    values = [one.get(key) for one in of]
    bounds = [one.get("interval95") for one in of]
    value = None if None in values or not values else mean(values)  # type: ignore[type-var]
    if value is None or not all(bounds):
        return number(value, 2)
    low, high = min(b[0] for b in bounds), max(b[1] for b in bounds)  # type: ignore[index]
    return f"{number(value, 2)} [{number(low, 2)}, {number(high, 2)}]"


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many digits; - where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def main() -> None:
    """Print the table, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="the folder of the study")
    parser.add_argument("--output", type=Path, default=KEPT, help="a file of Markdown")
    options = parser.parse_args()
    if not (options.study / "seed0").is_dir():
        parser.error(
            f"{str(options.study)!r} is no study with seed 0. Run: unlora study experiment=..."
        )
    text = table(options.study)
    options.output.write_text(text + "\n", "utf-8")
    print(text)


if __name__ == "__main__":
    main()
