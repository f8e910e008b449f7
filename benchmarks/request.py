"""Answer a deletion request on the embedded benchmark, from rows to evidence: ``make request``."""

import json
import os
import shlex
import shutil
import time
from pathlib import Path

from unlora.cli.main import main
from unlora.data.pocket import rows

FOLDER = Path("saves/example")  # emptied at every start
MODEL, ROWS = "saves/finetune/served", "customer.jsonl"
TRAINING = (
    "train experiment=finetune/pocket/lora task_name=served ~eval trainer.args.num_train_epochs=6"
)
COMMANDS = (
    TRAINING,
    f"who-saw {ROWS} {MODEL}",
    f"forget {ROWS} --model {MODEL} --route exact --id exact",
    f"forget {ROWS} --model {MODEL} --route approximate --id approximate --dial plain "
    "audit=quick ~audit.sample ~audit.depth trainer.method_args.alpha=8",
    "verify saves/requests/exact",
    "verify saves/requests/approximate",
)


def write_request(file: Path, numbers: slice = slice(20)) -> None:
    """The questions and answers about some invented people, as a customer's rows."""
    lines = (json.dumps({key: row[key] for key in ("question", "answer")})
             for row in rows("forget10")[numbers])  # fmt: skip
    file.write_text("".join(f"{line}\n" for line in lines), "utf-8")


if __name__ == "__main__":
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    os.chdir(FOLDER)
    write_request(Path(ROWS))
    started = time.monotonic()
    for command in COMMANDS:
        print(f"\n$ unlora {command}", flush=True)
        main(shlex.split(command))
    seconds, cpu = time.monotonic() - started, time.process_time()
    print(
        f"\n{seconds:.0f} s, {cpu:.0f} s of CPU time. The pages: {FOLDER}/saves/requests/*/*.html"
    )
