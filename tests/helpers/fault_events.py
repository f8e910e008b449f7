"""Moments of a run that can be counted, and what happens to the run at one of them.

A moment is a forward pass of any module, a step of an optimiser, or a file that is opened for
writing, renamed or removed. Product code knows nothing of it: passes and steps are torch's hooks,
files are Python's audit events. What libraries write without Python is cut off in the middle by a
limit on the size of files.
"""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILES = ("open", "os.rename", "os.remove", "os.mkdir")


@dataclass
class Events:
    """Counts moments, and lets the fault happen.

    Attributes:
        kind: ``forward``, ``step`` or ``file``.
        number: which one of them, from 1; 0 is none: moments are only counted.
        do: ``kill``, ``term``, ``term all`` (with the children), ``raise``, ``full``, or ``cut``:
            from then on no file can grow beyond ``size`` bytes, and the process dies in the middle
            of the one that would.
        under: files below this folder count.
        save: where the list of moments goes at the end: kind and, for files, name.
    """

    kind: str = ""
    number: int = 0
    do: str = "kill"
    under: str = ""
    size: int = 0
    save: str = ""
    seen: list[tuple[str, str]] = field(default_factory=list)
    count: int = 0

    def met(self, kind: str, what: str = "") -> None:
        if self.save:
            self.seen.append((kind, what))
        if kind != self.kind:
            return
        self.count += 1
        if self.count == self.number or (self.do == "full" and 0 < self.number <= self.count):
            self._happen()

    def _happen(self) -> None:
        if self.do == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.do == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.do == "term all":
            # from outside: a worker takes it for its end where it comes from its parent
            subprocess.run(["kill", "-TERM", "--", f"-{os.getpid()}"], start_new_session=True)
        elif self.do == "raise":
            raise RuntimeError("planted")
        elif self.do == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif self.do == "cut":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def write(self) -> None:
        if self.save:
            file, self.save = self.save, ""
            Path(file).write_text(json.dumps(self.seen))

    def file(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in FILES:
            return
        if event == "open" and not (
            isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ):
            return
        if isinstance(args[0], (str, bytes, os.PathLike)):
            name = os.path.abspath(os.fsdecode(args[0]))
            if name.startswith(self.under) and not name.endswith(".lock"):
                self.met("file", f"{event} {os.path.relpath(name, self.under)}")


def install(fault: dict[str, Any] | None) -> Events:
    """Let it happen in this process."""
    from torch.nn.modules.module import register_module_forward_pre_hook
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    events = Events(**(fault or {}))
    if events.do == "term all":
        os.setpgid(0, 0)  # a group of its own
    if fault:
        register_module_forward_pre_hook(lambda *_: events.met("forward") or None)
        register_optimizer_step_pre_hook(lambda *_: events.met("step"))
        sys.addaudithook(events.file)
    return events
