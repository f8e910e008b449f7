"""Training: one trainer, any objective.

trainer.handler, trainer.method_args  ->  UnlearningLoss   (loss.py)
trainer.args                          ->  TrainingArguments (arguments.py)
both, a model and data                ->  UnlearningTrainer (trainer.py)
"""

from unlora.trainer.arguments import choose_best_by, set_warmup, training_arguments
from unlora.trainer.callbacks import Guards
from unlora.trainer.checkpoints import checkpoint_to_resume, refuse_own_model
from unlora.trainer.loss import UnlearningLoss
from unlora.trainer.trainer import UnlearningTrainer

__all__ = [
    "Guards",
    "UnlearningLoss",
    "UnlearningTrainer",
    "checkpoint_to_resume",
    "choose_best_by",
    "refuse_own_model",
    "set_warmup",
    "training_arguments",
]
