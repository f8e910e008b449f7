"""How LoRA unlearning is trained today, for ``training.py`` to compare with.

transformers' Trainer, written as its users do: the reference is a deep copy of the model and runs
in every step; rows are tokenised whenever they are read and padded to the longest of a random
batch; ``labels`` go into every forward pass, so that transformers makes a loss of its own; logits
exist for every position; RMU runs the whole model for the states of one layer.

The formulas are the right ones, and a loss is a mean over the effective batch, as in the program:
only then can the two be compared to the last digits.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer

IGNORED = -100
Batch = Mapping[str, Tensor]
NPO_BETA, SIMNPO_BETA, SIMNPO_DELTA, UNDIAL_BETA, STEERING = 0.1, 4.5, 1.0, 10.0, 2.0


class Texts(torch.utils.data.Dataset):
    """Pairs of a forget and a retain row, tokenised at every access."""

    def __init__(self, chat: Any, forget: Sequence[Any], retain: Sequence[Any]):
        self.chat, self.rows = chat, {"forget": forget, "retain": retain}

    def __len__(self) -> int:
        return len(self.rows["forget"])

    def __getitem__(self, index: Mapping[str, int]) -> dict[str, Any]:
        found = {}
        for part, rows in self.rows.items():
            row = rows[index[part]]
            found[part] = self.chat.encode(row["question"], row["answer"])
        return found


class BaselineTrainer(Trainer):
    """``method`` is NPO, GradDiff, SimNPO, UNDIAL or RMU, with NLL or EMBED_DIFF to retain.

    Args:
        order: the rows of each step.
        control: float [width], RMU's direction.
        layer: RMU's.
        careful: no loss that nobody asks for, and no copies of logits for the losses of rows.
    """

    def __init__(
        self, *args: Any, method: str, order: Any, control: Tensor, layer: int, careful: bool,
        **kwargs: Any,
    ):  # fmt: skip
        super().__init__(*args, **kwargs)
        self.method, self.order, self.control, self.layer = method, order, control, layer
        self.careful = careful
        self.model_accepts_loss_kwargs = False
        needs_reference = method in ("NPO", "UNDIAL", "RMU")
        self.reference = copy.deepcopy(self.model).eval() if needs_reference else None
        self.losses: list[float] = []

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return self.order

    def get_batch_samples(self, iterator: Any, count: int, device: Any) -> tuple[list, Any]:
        batches, _ = super().get_batch_samples(iterator, count, device)
        totals = {
            part: (
                sum(len(b[part]["labels"]) for b in batches),
                sum(int((b[part]["labels"][:, 1:] != IGNORED).sum()) for b in batches),
            )
            for part in ("forget", "retain")
        }
        return batches, totals

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Batch],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        forget, retain = ({k: v for k, v in inputs[p].items() if k != "number"} for p in inputs)
        rows, tokens = num_items_in_batch["forget"]
        retain_rows, retain_tokens = num_items_in_batch["retain"]
        if self.method == "RMU":
            states = self.states(model, forget)
            gap = (states - STEERING * self.control).square().mean(-1)
            first = mean_by_row(gap, forget["labels"]).sum() / rows
            with torch.no_grad():
                wanted = self.states(self.reference, retain)
            gap = (self.states(model, retain) - wanted).square().mean(-1)
            second = mean_by_row(gap, retain["labels"]).sum() / retain_rows
        else:
            first = getattr(self, self.method)(model, forget, rows, tokens)
            outputs = model(**retain)
            scored = int((retain["labels"][:, 1:] != IGNORED).sum())
            second = outputs.loss * (scored / retain_tokens)
        loss = (first + second) * self.current_gradient_accumulation_steps
        self.losses.append(float(loss.detach()))
        return loss

    def NPO(self, model: nn.Module, forget: Batch, rows: int, tokens: int) -> Tensor:
        with torch.no_grad():
            reference = self.row_losses(self.reference, forget)
        log_ratio = reference - self.row_losses(model, forget)
        return -2 / NPO_BETA * F.logsigmoid(-NPO_BETA * log_ratio).sum() / rows

    def GradDiff(self, model: nn.Module, forget: Batch, rows: int, tokens: int) -> Tensor:
        scored = int((forget["labels"][:, 1:] != IGNORED).sum())
        return -model(**forget).loss * (scored / tokens)

    def SimNPO(self, model: nn.Module, forget: Batch, rows: int, tokens: int) -> Tensor:
        lengths = (forget["labels"][:, 1:] != IGNORED).sum(-1)
        mean = self.row_losses(model, forget) / lengths - SIMNPO_DELTA
        return -2 / SIMNPO_BETA * F.logsigmoid(SIMNPO_BETA * mean).sum() / rows

    def UNDIAL(self, model: nn.Module, forget: Batch, rows: int, tokens: int) -> Tensor:
        student = self.asked(model, forget).logits[:, :-1].contiguous()
        labels = forget["labels"][:, 1:].contiguous()
        with torch.no_grad():
            teacher = self.asked(self.reference, forget).logits[:, :-1].contiguous()
        memorised = torch.zeros_like(student).scatter_(-1, labels.clamp(min=0)[..., None], 1.0)
        wanted = torch.softmax(teacher - memorised * UNDIAL_BETA, dim=-1)
        losses = F.cross_entropy(
            student.view(-1, student.shape[-1]), wanted.view(-1, student.shape[-1]),
            reduction="none",
        ).view(labels.shape)  # fmt: skip
        return losses[labels != IGNORED].sum() / tokens

    def states(self, model: nn.Module, batch: Batch) -> Tensor:
        found = self.asked(model, batch, output_hidden_states=True)
        return found.hidden_states[self.layer + 1]

    def row_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        found = careful_row_losses if self.careful else row_losses
        return found(self.asked(model, batch).logits, batch["labels"])

    def asked(self, model: nn.Module, batch: Batch, **more: Any) -> Any:
        """What a model says; from labels in the batch transformers computes a loss as well."""
        left_out = ("labels",) if self.careful else ()
        return model(**{k: v for k, v in batch.items() if k not in left_out}, **more)


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p of each answer."""
    logits, labels = logits[:, :-1].contiguous(), labels[:, 1:].contiguous()
    losses = F.cross_entropy(logits.transpose(-1, -2), labels, ignore_index=IGNORED,
                             reduction="none")  # fmt: skip
    return losses.sum(-1)


def careful_row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The same; labels are shifted in place of logits, which stay where they are."""
    labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED,
                             reduction="none")  # fmt: skip
    return losses.view(labels.shape).sum(-1)


def mean_by_row(values: Tensor, labels: Tensor) -> Tensor:
    # the program looks at the states of scored tokens, the first position of a row left out
    mask = (labels != IGNORED) & (torch.arange(labels.shape[1], device=labels.device) > 0)
    return (values * mask).sum(-1) / mask.sum(-1)
