"""How time and memory of an evaluation grow with the rows, the answers and the vocabulary.

make bench-more                        among others
python benchmarks/growth.py            alone, in about ten minutes

A very small model evaluates random words, in rows as long as TOFU's: the metrics of
``experiment=eval/tofu/default`` on 100 to 4,000 rows, then with a vocabulary eight times as large,
and with answers eight times as long as well. Wanted: a straight line fits the seconds, and the peak
memory above the loaded model is the same for all. Memory is what is in use: a freed block goes back
at once.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
from evaluation_rows import SIZES, SPLITS, prepare
from training import ALLOCATOR

ROWS = (100, 500, 1_000, 2_000, 4_000)
LONGER = 8


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and write; returns what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=ROWS)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    os.environ.update(ALLOCATOR)
    points = [point(rows) for rows in options.rows]
    wider = point(options.rows[1], vocabulary=LONGER)
    longer = point(options.rows[1], longer=LONGER, vocabulary=LONGER)
    seconds = np.array([one["seconds"] for one in points])
    rows = np.array(options.rows, float)
    slope, offset = np.polyfit(rows, seconds, 1)
    rest = seconds - (slope * rows + offset)
    power, _ = np.polyfit(np.log(rows), np.log(seconds), 1)
    found = {
        "rows": list(options.rows),
        "seconds": seconds.tolist(),
        "memory": [one["memory"] for one in points],
        "seconds_a_row": slope,
        "explained": 1 - float(rest @ rest) / float(((seconds - seconds.mean()) ** 2).sum()),
        "power": power,
        "wider_memory": wider["memory"],
        "longer_memory": longer["memory"],
        "machine": evaluate.description(options_of_all(), "made-up")["machine"],
    }
    for n, one in zip(options.rows, points, strict=True):
        print(f"{n:5} rows: {one['seconds']:6.2f} s, peak {one['memory'] / 1e6:4.0f} MB")
    print(
        f"a line explains {found['explained']:.2%}; {1000 * slope:.2f} ms a row; "
        f"as rows ^ {power:.2f}"
    )
    for words, one in (("vocabulary", wider), ("answers and vocabulary", longer)):
        print(f"{options.rows[1]} rows, {words} x {LONGER}: peak {one['memory'] / 1e6:.0f} MB")
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return found


def options_of_all() -> argparse.Namespace:
    """Of every evaluation here."""
    return evaluate.options_of(["--new-tokens=8", "--metrics=default"])


def point(rows: int, longer: int = 1, vocabulary: int = 1) -> dict[str, Any]:
    """Seconds and peak bytes of one evaluation in a process of its own."""
    size = SIZES["small"]
    size = replace(size, vocabulary=vocabulary * size.vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), size, rows // len(SPLITS), None, longer)
        with evaluate.start_side("ours", Path(folder), options_of_all()) as side:
            return side.tell("once")


if __name__ == "__main__":
    main()
