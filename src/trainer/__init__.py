"""Training: one trainer, any objective.

trainer.handler, trainer.method_args  ->  UnlearningLoss   (loss.py)
trainer.args                          ->  TrainingArguments (arguments.py)
both, a model and data                ->  UnlearningTrainer (trainer.py)
"""

from unlora.trainer.arguments import choose_best_by, set_warmup, training_arguments
from unlora.trainer.callbacks import Guards
from unlora.trainer.loss import UnlearningLoss
from unlora.trainer.trainer import UnlearningTrainer

__all__ = [
    "Guards",
    "UnlearningLoss",
    "UnlearningTrainer",
    "choose_best_by",
    "set_warmup",
    "training_arguments",
]
