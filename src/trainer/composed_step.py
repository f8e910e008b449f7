"""Compose the gradient of an optimiser step from the gradients of its terms.

SAM, GRU, BalDRO and the constraints need the gradient of each term by itself, over the whole
effective batch. So such a step does not add up micro-batches as they come: it runs all of them for
the retain term, then all of them for the forget term, and puts the result where the optimiser
looks for it. It holds one gradient of the trained weights more than a plain step; with LoRA that
is the size of the adapter.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import Tensor, nn

from unlora.data.pairs import BLANK
from unlora.errors import InputError
from unlora.model.adapter_init import has_start
from unlora.trainer import constraint as constraints
from unlora.trainer.constraint import AugmentedLagrangian
from unlora.trainer.gradients import (
    Gradient,
    dot,
    ema,
    perturbed,
    project_out_conflict,
    robust_weights,
)
from unlora.trainer.loss import SUBTRACTED, Totals, UnlearningLoss
from unlora.trainer.plugins import GRU, Plugins
from unlora.trainer.step_context import StepContext
from unlora.trainer.term_losses import Batch

Penalty = Callable[[nn.Module], Tensor]


class NonFiniteLoss(Exception):
    """The loss of a term is NaN or infinite, so the step cannot be finished.

    All processes raise it at the same place.
    """

    def __init__(self, term: str, value: float, batches: Sequence[Batch]):
        super().__init__(f"{term}_loss is {value}")
        self.name, self.value, self.batches = f"{term}_loss", value, batches


def is_composed(loss: UnlearningLoss, plugins: Plugins) -> bool:
    """Return whether a step needs the gradient of each term by itself."""
    return plugins.compose_gradients or loss.constraint is not None


def require_whole_gradients(
    model: nn.Module, loss: UnlearningLoss, plugins: Plugins, *, fp16: bool, split: bool
) -> None:
    """Raise InputError where a method needs gradients or weights that it would not get.

    Args:
        fp16: gradients are scaled.
        split: weights are spread over processes, and whole in a forward pass only.
    """
    if is_composed(loss, plugins) and (fp16 or split):
        raise InputError(
            "A step that is composed of several gradients (SAM, GRU, BalDRO, PDU, BLADE) needs "
            "them as they are: set trainer.args.bf16 in place of fp16, without deepspeed or "
            "fsdp."
        )
    started = isinstance(model, PeftModel) and has_start(model)
    if split and (loss.handler in SUBTRACTED or started):
        raise InputError(
            "Task vectors (Negation, PerTA) and adapters that do not start from zero (FILA, "
            "ReGLU, PiSSA, OLoRA) need whole weights: train without deepspeed or fsdp."
        )


class ComposedStep:
    """Compute the gradient of one optimiser step from the gradients of the terms.

    Args:
        penalty: a loss on the weights alone, added to that on the data.
    """

    def __init__(self, context: StepContext, plugins: Plugins, penalty: Penalty | None = None):
        self.context, self.plugins, self.penalty = context, plugins, penalty
        self.loss, self.state = context.losses.loss, context.state
        self._reached: set[int] = set()  # the parameters that a term had a gradient for
        self._before: tuple[Any, ...] = ()  # see undo

    @property
    def converged(self) -> bool:
        """Whether a constraint ends the training."""
        return self.loss.constraint is not None and self.loss.constraint.converged

    def compute_gradients(
        self, model: nn.Module, batches: Sequence[Batch], totals: Totals
    ) -> Tensor:
        """Set the gradients for one step on these micro-batches, and return the loss.

        Raises:
            NonFiniteLoss: a term has no finite loss.
        """
        model.train()
        weights, constraint = dict(self.loss.weights), self.loss.constraint
        gradients, values = {}, {}
        self._reached.clear()
        self._keep_before()
        if constraint is not None:
            self.context.losses.inner_step = 0
            constraint.prepare(partial(self._inner_step, model, self._retain_rows(batches)))
        if self.loss.retain is not None:
            gradients["retain"], values["retain"] = self._gradient(model, batches, totals, "retain")
        if constraint is not None:
            weights["retain"] = constraint.weight(values["retain"])
            self.context.means.add("multiplier", constraint.multiplier)
        if self.loss.forget is not None:
            gradients["forget"], values["forget"] = self._forget_gradient(model, batches, totals)
        if self.plugins.gru is not None:
            gradients["forget"] = self._rectify(self.plugins.gru, **gradients)
        if constraint is not None and "forget" in values:
            epoch = float(self.context.trainer_state().epoch or 0.0)
            constraint.update(values["forget"], values["retain"], epoch)
        self._set_gradients(weights, gradients)
        for name, value in values.items():
            self.context.means.add(f"{name}_loss", value)
        total = sum(weights[name] * value for name, value in values.items())
        return torch.tensor(total + self._add_penalty(), device=self.context.args.device)

    def undo(self) -> None:
        """Put weights and method state back to before :meth:`compute_gradients`.

        The gradients are to be dropped.
        """
        constraint, self.state.retain_average, weights = self._before
        if self.loss.constraint is not None:
            constraints.restore(self.loss.constraint, constraint)
        with torch.no_grad():
            for parameter, old in zip(self._trained(), weights, strict=False):
                parameter.copy_(old)

    def _keep_before(self) -> None:
        constraint = self.loss.constraint
        values = constraints.state(constraint) if constraint is not None else {}
        moves = isinstance(constraint, AugmentedLagrangian)  # its inner steps move the weights
        weights = [p.detach().clone() for p in self._trained()] if moves else []
        self._before = values, self.state.retain_average, weights

    def _retain_rows(self, batches: Sequence[Batch]) -> list[int]:
        """Count the retain rows of each micro-batch."""
        return [
            0 if self.context.losses.is_blank(batch) else len(batch["retain"]["input_ids"])
            for batch in batches
        ]

    def _rectify(self, gru: GRU, *, forget: Gradient, retain: Gradient) -> Gradient:
        average = ema(self.state.retain_average, retain, gru.moving_avg)
        self.state.retain_average = average
        return project_out_conflict(forget, average)

    def _set_gradients(
        self, weights: Mapping[str, float], gradients: Mapping[str, Gradient]
    ) -> None:
        for i, parameter in enumerate(self._trained()):
            if i in self._reached:  # a guard looks for those that are not
                shares = [weights[name] * gradient[i] for name, gradient in gradients.items()]
                parameter.grad = torch.stack(shares).sum(0)

    def _add_penalty(self) -> float:
        """Add the penalty's gradient, and return its value."""
        if self.penalty is None:
            return 0.0
        penalty = self.penalty(self.context.model)
        penalty.backward()
        return float(penalty.detach())

    def _forget_gradient(
        self, model: nn.Module, batches: Sequence[Batch], totals: Totals
    ) -> tuple[Gradient, float]:
        row_weights = self._row_weights(model, batches)
        gradient, value = self._gradient(model, batches, totals, "forget", row_weights)
        if self.plugins.sam is None:
            return gradient, value
        with perturbed(self._trained(), gradient, self.plugins.sam.rho):
            return self._gradient(model, batches, totals, "forget", row_weights)

    def _gradient(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        totals: Totals,
        term: str,
        row_weights: Sequence[Tensor] | None = None,
    ) -> tuple[Gradient, float]:
        """Compute the gradient of one term over the effective batch of all processes.

        Returns:
            The gradient, and the term's loss.
        """
        context, parameters = self.context, self._trained()
        for parameter in parameters:
            parameter.grad = None
        value = 0.0
        for i, batch in enumerate(batches):
            weighted = None if row_weights is None else row_weights[i]
            # what DDP would average is summed below: each process holds its share of the loss
            with context.accelerator.no_sync(model):
                with context.autocast():
                    loss = context.losses.compute(
                        model, batch, totals, terms=(term,), row_weights=weighted
                    )[term]
                context.accelerator.backward(loss)
            value += float(loss.detach())
        self._reached |= {i for i, p in enumerate(parameters) if p.grad is not None}
        gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        gradient = [context.accelerator.reduce(part, "sum") for part in gradient]
        total = context.accelerator.reduce(torch.tensor(value, device=context.args.device), "sum")
        if not math.isfinite(value := float(total)):
            raise NonFiniteLoss(term, value, batches)
        return gradient, value

    @torch.no_grad()
    def _row_weights(self, model: nn.Module, batches: Sequence[Batch]) -> list[Tensor] | None:
        """Compute BalDRO's weight of every forget row of the effective batch, by micro-batch."""
        if self.plugins.dro is None:
            return None
        assert self.loss.forget is not None
        own = []
        for batch in batches:
            views = self.context.losses.views(model, batch, ("forget",))
            losses = self.loss.forget(views, self.state.drawn)
            by_row = self.loss.by_row(losses, views, empty=-math.inf)
            blank = self.context.losses.is_blank(batch)
            own.append(torch.full_like(by_row, -math.inf) if blank else by_row)
        accelerator, losses = self.context.accelerator, torch.cat(own)
        # the last step of an epoch may have fewer rows in some processes
        padded = accelerator.pad_across_processes(losses, pad_index=-math.inf)
        first = self.context.args.process_index * len(padded)
        weights = robust_weights(accelerator.gather(padded), self.plugins.dro)
        return list(weights[first : first + len(losses)].split([len(rows) for rows in own]))

    def _inner_step(self, model: nn.Module, sizes: Sequence[int], learning_rate: float) -> float:
        """Make a step of plain gradient descent on fresh retain rows; return their loss before."""
        context, args = self.context, self.context.args
        context.losses.inner_step += 1
        batches = [
            send_to_device(context.collate([{"retain": i} for i in rows]), args.device)
            for rows in self._draw_retain_rows(sizes)
        ]
        totals = context.losses.totals(batches, ("retain",))
        gradient, value = self._gradient(model, batches, totals, "retain")
        longest = args.max_grad_norm or math.inf
        length = max(float(dot(gradient, gradient).sqrt()), 1e-12)
        step = learning_rate * min(1.0, longest / length)
        with torch.no_grad():
            for parameter, slope in zip(self._trained(), gradient, strict=True):
                parameter.sub_(step * slope)
        return value

    def _draw_retain_rows(self, sizes: Sequence[int]) -> list[list[int]]:
        """Draw as many rows for each micro-batch of this process as ``sizes`` says."""
        context, args = self.context, self.context.args
        own = torch.tensor([sum(sizes)], device=args.device)
        counts = context.accelerator.gather(own).tolist()
        # all processes draw the same rows, and each takes its own of them
        generator = np.random.default_rng(
            [args.seed, 0, context.trainer_state().global_step, context.losses.inner_step]
        )
        drawn = generator.integers(len(context.parts.rows["retain"]), size=sum(counts))
        drawn = drawn[sum(counts[: args.process_index]) :][: sum(sizes)]
        # where there is no row for this process, a blank one takes part in the step
        return [part.tolist() or [BLANK] for part in np.split(drawn, np.cumsum(sizes)[:-1])]

    def _trained(self) -> list[nn.Parameter]:
        return list(self.context.trained.values())
