"""What an audit and a dial cost beside the unlearning and the evaluation they follow, on pocket.

    python benchmarks/audit_cost.py [FOLDER]

Every figure is of a command as users type it, with the start of the program: processor seconds
(user and system) and the highest resident memory. The first audit asks target and gold as well;
the second finds what they said in the cache, as all but the first audit of a study do.
"""

import argparse
import os
import shlex
import sys
import tempfile
from pathlib import Path

TARGET, GOLD = "saves/finetune/target", "saves/finetune/gold"
TRAIN = "train experiment=finetune/pocket/lora ~eval task_name="
UNLEARN = f"unlearn experiment=unlearn/pocket/lora model={TARGET} retain_logs_path={GOLD} trainer="
AUDIT = f"audit=default target={TARGET} retain_model={GOLD}"
# name -> a command; those without a name are what the others need
COMMANDS = (
    ("", f"{TRAIN}target"),
    ("", f"{TRAIN}gold data.train.POCKET_QA_full.args.hf_args.name=retain90"),
    ("", f"{UNLEARN}SimNPO task_name=SimNPO"),
    ("unlearn and evaluate", f"{UNLEARN}NPO task_name=NPO"),
    ("evaluate", "eval experiment=eval/pocket/default model=saves/unlearn/NPO task_name=again"),
    ("first audit", f"audit saves/unlearn/SimNPO {AUDIT}"),
    ("audit", f"audit saves/unlearn/NPO {AUDIT}"),
    ("dial", f"dial saves/unlearn/NPO --to plain target={TARGET} retain_model={GOLD}"),
)


def cost(command: str, folder: Path, cache: Path) -> tuple[float, float]:
    """Processor seconds and the highest resident megabytes of one command."""
    words = [sys.executable, "-m", "unlora", *shlex.split(command)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "UNLORA_CACHE": str(cache)}
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        os.dup2(os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        os.execve(sys.executable, words, environment)
    _, status, used = os.wait4(child, 0)
    if status:
        text = (folder / "log.txt").read_text("utf-8")
        sys.exit(f"unlora {command} failed:\n{text[-2000:]}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1000


def main() -> None:
    """Print one line for each command, and the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="a new folder; else a temporary one")
    folder: Path | None = parser.parse_args().folder
    if folder is not None and folder.exists():
        parser.error(f"{str(folder)!r} is there already. Give a new folder.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (folder or Path(temporary, "runs")).absolute()
        folder.mkdir(parents=True)
        costs: dict[str, tuple[float, float]] = {}
        for name, command in COMMANDS:
            # an evaluation anew has to answer anew
            cache = folder / ("cache-again" if name == "evaluate" else "cache")
            seconds, megabytes = cost(command, folder, cache)
            if name:
                costs[name] = (seconds, megabytes)
                print(f"{name:22} {seconds:7.1f} CPU s {megabytes:7.0f} MB", flush=True)
    for name, beside in (("audit", "unlearn and evaluate"), ("dial", "evaluate")):
        time, memory = (a / b for a, b in zip(costs[name], costs[beside], strict=True))
        print(f"{name} / {beside}: {time:.2f} of the time, {memory:.2f} of the memory")


if __name__ == "__main__":
    main()
