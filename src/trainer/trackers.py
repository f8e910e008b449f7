"""Send the numbers of a run to tensorboard, in its own folder, or to another tracker.

``trainer.args.report_to`` names them. All that a tracker shows of a run has a stable name, see
``docs/trackers.md``: the log of training as ``train/...``, the guards as ``train/guard/...``, and
the evaluations, during training and after it, as ``eval/<metric>``.
"""

import copy
import math
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import integration_utils

from unlora.errors import InputError
from unlora.registry import unknown
from unlora.runs.redaction import redacted
from unlora.trainer.callbacks import Guards

FOLDER = "logs"  # of tensorboard, in the run folder
# tracker -> the module it needs and what pip calls it, where that is not its own name
MODULES = {
    "azure_ml": ("azureml", "azureml-core"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "flyte": ("flytekit", "flytekit"),
    "kubeflow": ("kubeflow", "kubeflow"),
}


def check_installed(trackers: Sequence[str]) -> None:
    """Raises InputError where a tracker is unknown or not installed."""
    known = integration_utils.INTEGRATION_TO_CALLBACK
    for tracker in trackers:
        if tracker not in known:
            raise InputError(unknown("tracker in trainer.args.report_to", tracker, known))
        module, package = MODULES.get(tracker, (tracker, tracker))
        if find_spec(module) is None:
            raise InputError(
                f"trainer.args.report_to is {tracker}, which is not installed. "
                f"Run: pip install {package}, or set trainer.args.report_to=none."
            )


class Trackers(TrainerCallback):
    """Hands the log of a run to its trackers, which stay open until the last evaluation is told.

    Trainer would close them when training is over, and open them anew for what comes after.

    Args:
        names: as in ``TrainingArguments.report_to``.
        folder: the run folder.
        guards: what they found is told with the next log.
    """

    def __init__(self, names: Sequence[str], folder: str | Path, guards: Guards):
        self.names, self.folder, self.guards = tuple(names), Path(folder), guards
        self._open: dict[str, TrainerCallback] = {}
        self._run: tuple[Any, ...] = ()
        self._common: dict[str, Any] = {}
        self._told: set[str] = set()
        self._foreign_wandb = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        args = copy.copy(args)  # trackers keep them all
        for name, value in vars(args).items():
            if isinstance(value, str):
                vars(args)[name] = redacted(value)
        self._run = (args, state, control)
        self._common = {key: kwargs.get(key) for key in ("model", "processing_class")}
        self._foreign_wandb = _wandb_run() is not None
        for name in self.names:
            if name != "tensorboard":
                self._open[name] = integration_utils.INTEGRATION_TO_CALLBACK[name]()
            elif state.is_world_process_zero:
                writer = tensorboard_writer(self.folder / FOLDER, state.global_step)
                self._open[name] = integration_utils.TensorBoardCallback(writer)
        for tracker in self._open.values():
            tracker.on_train_begin(args, state, control, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        new = {name: v for name, v in self.guards.values.items() if name not in self._told}
        self._told |= new.keys()
        figures = {f"guard/{name.replace(' ', '_')}": value for name, value in new.items()}
        logs = {**(logs or {}), **figures}
        for name, tracker in self._open.items():
            # mlflow alone would show the names without their train/ and eval/
            told = integration_utils.rewrite_logs(logs) if name == "mlflow" else dict(logs)
            tracker.on_log(args, state, control, logs=told, **kwargs)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        for tracker in self._open.values():
            tracker.on_save(args, state, control, **kwargs)

    def evaluated(self, summary: Mapping[str, float]) -> None:
        """Tell the figures of the whole suites, as ``eval/<metric>`` at the last step."""
        finite = {f"eval_{name}": v for name, v in summary.items() if math.isfinite(v)}
        if self._run:
            args, state, control = self._run
            self.on_log(args, state, control, logs=finite, **self._common)

    def close(self) -> None:
        """End the run in every tracker, so that the next one in this process is another."""
        for tracker in self._open.values():
            tracker.on_train_end(*self._run, **self._common)
        own_wandb = "wandb" in self._open and not self._foreign_wandb
        if own_wandb and (run := _wandb_run()) is not None:
            run.finish()
        self._open, self._run, self._common = {}, (), {}


def tensorboard_writer(folder: Path, step: int) -> Any:
    """A writer of event files; a run that goes on at ``step`` takes back what came after it."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(log_dir=str(folder), purge_step=step + 1 if step else None)


def _wandb_run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)
