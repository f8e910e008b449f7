"""Handle SIGTERM of a preempted job, and Ctrl-C: write a checkpoint, then stop.

First a checkpoint, then the end.
"""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from unlora.runs.atomic_files import is_main_process

AFTER_THIS_STEP = "\nCtrl-C: a checkpoint is written after this step; again ends it at once\n"
CODE = 128 + signal.SIGTERM  # 143, what a shell reports of a process that SIGTERM has ended


class Stopped(SystemExit):
    """The run was told to stop and has left everything in order; the exit code is 143."""

    def __init__(self, message: str):
        super().__init__(CODE)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Preemption(TrainerCallback):
    """While it is entered, SIGTERM and Ctrl-C end a training after its step, with a checkpoint.

    Before the first step and after the last one they end it at once, and so does a second Ctrl-C.
    All processes of a run write the same checkpoint, whichever of them was told.

    Args:
        folder: the run folder, for what is said at the end.
        resume: the checkpoint that the run goes on from.
    """

    def __init__(self, folder: str, resume: str | None = None):
        self.folder = folder
        self._asked = self._leaving = self._training = False
        self._otherwise = f"Nothing was trained {f'since {resume}' if resume else 'yet'}"
        self._before: dict[int, Any] = {}
        self._number = int(signal.SIGTERM)

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():  # others may not
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._told)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if isinstance(error, Stopped) and is_main_process():
            print(error, file=sys.stderr, flush=True)

    def saved(self) -> None:
        """The result of the training is written; what comes now can be repeated.

        Raises:
            Stopped: SIGTERM came too late for a checkpoint.
            KeyboardInterrupt: Ctrl-C did.
        """
        self._training = False
        self._otherwise = (
            f"The trained model is in {self.folder}, and its evaluation is not finished: "
            f"unlora eval model={self.folder}"
        )
        if self._asked:
            raise self._stopped(self._otherwise)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training = True
        self._otherwise = (
            "What was trained since the last checkpoint is not kept; the same command with "
            "trainer.args.resume_from_checkpoint=auto goes on there, or from the beginning"
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        stops = self._asked
        if args.world_size > 1:
            flag = torch.tensor(int(stops), device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            stops = bool(flag)
        if stops and state.global_step < state.max_steps:
            self._asked = self._leaving = control.should_save = True
            args.save_only_model = False  # such a checkpoint could not be gone on from

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._leaving:
            return
        if args.world_size > 1:
            dist.barrier()  # when one of them ends, the others are ended
        raise self._stopped(
            f"The checkpoint {self.folder}/checkpoint-{state.global_step} was written; the same "
            "command with trainer.args.resume_from_checkpoint=auto goes on there"
        )

    def _told(self, number: int, frame: FrameType | None) -> None:
        again = self._asked and number == self._number == signal.SIGINT
        self._number = number
        if not self._training or again:
            raise self._stopped(self._otherwise)
        self._asked = True
        if number == signal.SIGINT and is_main_process():
            os.write(2, AFTER_THIS_STEP.encode())  # print may be what was interrupted

    def _stopped(self, what_now: str) -> BaseException:
        if self._number == signal.SIGINT:
            return KeyboardInterrupt(f"Stopped by Ctrl-C. {what_now}.")
        return Stopped(f"Stopped by SIGTERM. {what_now}.")
