"""SIGTERM, as machines send it that are wanted for something else: a checkpoint, then the end."""

import signal
import sys
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from unlora.run import is_main_process

CODE = 128 + signal.SIGTERM  # 143, what a shell reports of a process that SIGTERM has ended


class Stopped(SystemExit):
    """The run was told to stop and has left everything in order; the exit code is 143."""

    def __init__(self, message: str):
        super().__init__(CODE)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Preemption(TrainerCallback):
    """While it is entered, SIGTERM ends a training after its step, with a checkpoint.

    Before the first step and after the last one it ends the process at once. All processes of a run
    write the same checkpoint, whichever of them was told.

    Args:
        folder: the run folder, for what is said at the end.
        resume: the checkpoint that the run goes on from.
    """

    def __init__(self, folder: str, resume: str | None = None):
        self.folder = folder
        self._asked = self._leaving = self._training = False
        self._otherwise = f"Nothing was trained {f'since {resume}' if resume else 'yet'}"
        self._before: Any = None

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():  # others may not
            self._before = signal.signal(signal.SIGTERM, self._told)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        if isinstance(error, Stopped) and is_main_process():
            print(error, file=sys.stderr, flush=True)

    def saved(self) -> None:
        """The result of the training is written; what comes now can be repeated.

        Raises:
            Stopped: SIGTERM came too late for a checkpoint.
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

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        asked = self._asked
        if args.world_size > 1:
            flag = torch.tensor(int(asked), device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            asked = bool(flag)
        if asked and state.global_step < state.max_steps:
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
        if not self._training:
            raise self._stopped(self._otherwise)
        self._asked = True

    def _stopped(self, what_now: str) -> Stopped:
        return Stopped(f"Stopped by SIGTERM. {what_now}.")
