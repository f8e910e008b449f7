"""Train with one trainer for every objective.

trainer.handler, trainer.method_args  ->  UnlearningLoss   (loss.py)
trainer.plugins                       ->  Plugins           (plugins.py)
trainer.args                          ->  TrainingArguments (arguments.py)
trainer.args.report_to                ->  Trackers          (trackers.py)
all, a model and data                 ->  UnlearningTrainer (trainer.py)
"""

from unlora.trainer.arguments import (
    check_optimiser,
    choose_best_by,
    set_checkpointing,
    set_warmup,
    training_arguments,
)
from unlora.trainer.callbacks import Guards
from unlora.trainer.checkpoints import checkpoint_to_resume, refuse_own_model
from unlora.trainer.data_driven_init import start_adapter
from unlora.trainer.loss import SUBTRACTED, UnlearningLoss
from unlora.trainer.nonfinite import Divergence
from unlora.trainer.plugins import Plugins
from unlora.trainer.preemption import Preemption
from unlora.trainer.resume import Resumption, resumption, run_settings
from unlora.trainer.task_vector import TaskVector
from unlora.trainer.trackers import Trackers
from unlora.trainer.trainer import UnlearningTrainer

__all__ = [
    "SUBTRACTED",
    "Divergence",
    "Guards",
    "Plugins",
    "Preemption",
    "Resumption",
    "TaskVector",
    "Trackers",
    "UnlearningLoss",
    "UnlearningTrainer",
    "check_optimiser",
    "checkpoint_to_resume",
    "choose_best_by",
    "refuse_own_model",
    "resumption",
    "run_settings",
    "set_checkpointing",
    "set_warmup",
    "start_adapter",
    "training_arguments",
]
