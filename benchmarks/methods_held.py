"""Whether methods hold, before and after the dial: the table of ``docs/methods.md`` about attacks.

    unlora study experiment=study/pocket/methods seeds=[0]
    python benchmarks/methods_held.py saves/study/methods

Prints the table of a study whose methods were audited and dialled, and keeps it in
``results/methods_held.md``, from where ``methods.py`` takes it into the page.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unlora.results.audit_log import AuditLog, read_audit
from unlora.results.dial_log import read_dial
from unlora.results.run_result import read_run

KEPT = Path(__file__).parent / "results" / "methods_held.md"
HEADINGS = (
    "method", "residual", "HELD", "worst attack", "verdict", "utility",
    "scale", "residual dialled", "HELD dialled", "worst attack dialled", "verdict dialled",
    "utility dialled",
)  # fmt: skip
AT_ODDS = 0.1  # of what was known: beyond it a dialled model is not at equal forgetting


def table(study: Path) -> str:
    """The methods of the first seed, those of the highest utility at equal forgetting first."""
    home = study / "seed0"
    names = sorted(run.name for run in home.iterdir() if read_audit(run) is not None)
    rows = [_row(home, name) for name in names if not name.endswith("-dialled")]
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
    for _, cells in sorted(rows, key=lambda row: row[0]):
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _row(home: Path, name: str) -> tuple[tuple[bool, float], list[str]]:
    """Where a method stands in the order, and its cells."""
    run, dialled = home / name, home / f"{name}-dialled"
    before, after, dial = read_audit(run), read_audit(dialled), read_dial(run)
    assert before is not None
    if after is None or dial is None or not dial.reached:
        cells = [name, *_figures(before), before.verdict, number(_utility(run)), "none does"]
        return (True, -(_utility(run) or 0.0)), [*cells, *5 * "-"]
    cells = [name, *_figures(before), before.verdict, number(_utility(run)), f"{dial.scale:.2f}"]
    utility = _utility(dialled)
    cells += [*_figures(after), after.verdict, number(utility)]
    equal = abs((after.plain or {}).get("residual") or 0.0) <= AT_ODDS
    return (not equal, -(utility or 0.0)), cells


def _figures(log: AuditLog) -> list[str]:
    plain, held = log.plain or {}, log.held or {}
    return [
        interval(plain, "residual"), interval(held, "value"), str(held.get("worst", "-")),
    ]  # fmt: skip


def _utility(run: Path) -> float | None:
    return read_run(run).entry("TOFU", "model_utility").value


def interval(of: Mapping[str, Any], key: str) -> str:
    """A figure with its interval."""
    bounds: Sequence[float] | None = of.get("interval95")
    value = number(of.get(key), 2)
    return value if not bounds else f"{value} [{number(bounds[0], 2)}, {number(bounds[1], 2)}]"


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many digits; - where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def main() -> None:
    """Print the table, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="the folder of the study")
    study: Path = parser.parse_args().study
    if not (study / "seed0").is_dir():
        parser.error(f"{str(study)!r} is no study with seed 0. Run: unlora study experiment=...")
    text = table(study)
    KEPT.write_text(text + "\n", "utf-8")
    print(text)


if __name__ == "__main__":
    main()
