"""Processes that are measured in turns: one is told to go on, and says in a line what it found."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

MARK = "BENCH "
PATIENCE = 30.0  # seconds until one that goes on is killed
Found = dict[str, Any]


def say(found: Found) -> None:
    """In the process that is measured."""
    print(MARK + json.dumps(found), flush=True)


class Side:
    """A script of this folder in a process of its own, which ends with the ``with``."""

    def __init__(self, script: str, given: Sequence[str], environment: Mapping[str, str]):
        self.process = subprocess.Popen(
            [sys.executable, script, *given],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_exception: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()  # it ends by itself, and leaves no folder behind
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def tell(self, word: str) -> Found:
        """Let it go on; returns what it says next."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, as is said when it is read
            print(word, file=self.process.stdin, flush=True)
        return self.read()

    def read(self) -> Found:
        """What it says next.

        Raises:
            SystemExit: it has ended; why it has shown itself.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                found: Found = json.loads(line.removeprefix(MARK))
                return found
        command = " ".join([Path(str(self.process.args[1])).name, *self.process.args[2:]])
        raise SystemExit(f"{command} ended with {self.process.wait()}.")
