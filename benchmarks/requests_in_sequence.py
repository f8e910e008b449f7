"""Answer ten deletion requests, each on the model of the one before, on the embedded benchmark.

    python benchmarks/requests_in_sequence.py [key=value ...]

A request is all that the model was taught about one invented author. The words are those of
``unlora forget``, such as ``plugin=[Orthogonal]``. The table has a line for each: what is left of
the rows of the first request, how many earlier ones came back, and the mean probability of the
answers that were to stay. It goes on where it was stopped. The ten adapters are exported last.
"""

import os
import re
import shutil
import sys
import time
from pathlib import Path

from request import MODEL, TRAINING, write_request

from unlora.cli.main import main
from unlora.deletion.earlier import read_facts

FOLDER = Path("saves/sequence")
REQUESTS, ROWS = 10, 6  # rows about one author
SETTINGS = (
    "--route", "approximate", "--dial", "none", "audit=none", "trainer.method_args.alpha=8",
    "trainer.args.num_train_epochs=20", "model.lora_config.r=8", "model.lora_config.lora_alpha=32",
)  # fmt: skip


def answer(number: int, model: str, words: list[str]) -> dict:
    """What the evidence of a request says; it is answered first where it is not yet."""
    evidence, file = Path("saves/requests", f"request-{number}"), f"author{number}.jsonl"
    if not (evidence / "evidence.json").is_file():
        write_request(Path(file), slice((number - 1) * ROWS, number * ROWS))
        main(["forget", file, "--model", model, "--id", evidence.name, *SETTINGS, *words])
    return read_facts(evidence)


def line(number: int, facts: dict) -> str:
    """One request in the table."""
    first = facts["earlier"][0] if facts["earlier"] else facts["audit"]["attacks"][0]
    back = sum(request["came_back"] for request in facts["earlier"])
    retain = facts["audit"]["retain_probability"]["unlearned"]
    return f"| {number} | {first['residual']:.0%} | {back} | {retain:.3f} |"


def run(words: list[str]) -> None:
    """Print the table, and what the export says."""
    if not Path(MODEL, "manifest.json").is_file():
        main(TRAINING.split())
    model, table, before = MODEL, [], time.process_time()
    for number in range(1, REQUESTS + 1):
        facts = answer(number, model, words)
        model = facts["model"]["path"]
        if number == 1:
            at_first = facts["audit"]["retain_probability"]["target"]
            table.append(f"| 0 | 100% | | {at_first:.3f} |")
        table.append(line(number, facts))
    print("\n| requests | left of the first one's rows | came back | retain probability |")
    print("|---|---|---|---|")
    print("\n".join(table))
    shutil.rmtree(Path(model, "exported"), ignore_errors=True)
    main(["export", model, "--adapter"])
    print(f"{time.process_time() - before:.0f} s of CPU")


if __name__ == "__main__":
    folder = FOLDER / "-".join(["plain", *re.findall(r"\w+", " ".join(sys.argv[1:]))])
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    run(sys.argv[1:])
