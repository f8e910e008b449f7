"""How many rows `unlora who-saw` finds, exact and edited, over 20 runs of 4,000 rows.

python benchmarks/who_saw.py TOFU    # the folder with full.json, JSON Lines as TOFU has it
"""

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from unlora.recipes.who_saw import who_saw
from unlora.runs.row_hashes import write_row_hashes

RUNS, LACKING = 20, 200  # each run lacks 200 rows of its own
Row = dict[str, str]


def main() -> None:
    """Print, for each kind of edit, the share of rows found, false hits, and seconds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tofu", type=Path)
    text = (parser.parse_args().tofu / "full.json").read_text("utf-8").strip()
    rows = [json.loads(line) for line in text.split("\n")]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for n in range(RUNS):
            write_run(n, [row for i, row in enumerate(rows) if i // LACKING != n])
        for name, edit in EDITS.items():
            start = time.perf_counter()
            answer = who_saw([edit(row) for row in rows], ["saves"])
            seconds = time.perf_counter() - start
            seen = [{int(sighting.run.name) for sighting in of_row} for of_row in answer.rows]
            found = sum(len(runs - {i // LACKING}) for i, runs in enumerate(seen))
            false = sum(i // LACKING in runs for i, runs in enumerate(seen))
            share = found / (len(rows) * (RUNS - 1))
            print(f"{name:22} found {share:.2%}, false {false} of {len(rows)}, {seconds:.1f} s")


def write_run(number: int, rows: list[Row]) -> None:
    """Write a run folder that holds hashes and no model."""
    folder = Path("saves", "finetune", str(number))
    folder.mkdir(parents=True)
    pairs = [(row["question"], row["answer"]) for row in rows]
    facts = {"row_hashes": write_row_hashes(folder, {"train": pairs})}
    model = {"model_args": {"pretrained_model_name_or_path": "org/root"}}
    (folder / "run_config.json").write_text(
        json.dumps({"mode": "train", "model": model, "data": {}})
    )
    (folder / "manifest.json").write_text(json.dumps(facts))


def every(change: Callable[[str], str]) -> Callable[[Row], Row]:
    """Edit both texts of a row."""
    return lambda row: {key: change(row[key]) for key in ("question", "answer")}


def one_word(row: Row) -> Row:
    """Change, leave out or add a word of the question or the answer."""
    draw = random.Random(row["question"])
    key = draw.choice(["question", "answer"])
    words = row[key].split(" ")
    at = draw.randrange(len(words))
    kind = draw.randrange(3) if len(words) > 1 else 0
    words[at : at + (kind < 2)] = [[], ["zebra"], ["zebra"]][kind]
    return {"question": row["question"], "answer": row["answer"], key: " ".join(words)}


EDITS = {
    "exact": every(lambda text: text),
    "case": every(str.upper),
    "spaces": every(lambda text: "  ".join(text.split(" ")) + " "),
    "no punctuation": every(lambda text: "".join(c for c in text if c.isalnum() or c == " ")),
    "one word": one_word,
}


if __name__ == "__main__":
    main()
