"""One optimiser step whose gradient is made of those of its terms.

SAM, GRU, BalDRO and the constraints need the gradient of each term by itself, over the whole
effective batch. So such a step does not add up micro-batches as they come: it runs all of them for
the retain term, then all of them for the forget term, and puts the result where the optimiser
looks for it. It holds one gradient of the trained weights more than a plain step; with LoRA that
is the size of the adapter.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from unlora.data.collate import collate
from unlora.data.pairs import BLANK
from unlora.trainer import constraint as constraints
from unlora.trainer.constraint import AugmentedLagrangian
from unlora.trainer.gradients import Gradient, averaged, inner, moved_by, rectified, robust_weights
from unlora.trainer.loss import Totals

if TYPE_CHECKING:
    from unlora.trainer.trainer import UnlearningTrainer

Batches = Sequence[Mapping[str, Mapping[str, Tensor]]]


class ComposedStep:
    """The gradient of one optimiser step, from the gradients of the terms.

    Attributes:
        retain_average: GRU's moving average of the retain gradient, saved in checkpoints.
        inner_steps: how many a constraint has made in this step.
    """

    def __init__(self, trainer: "UnlearningTrainer"):
        self.trainer, self.loss, self.plugins = trainer, trainer.loss, trainer.plugins
        self.retain_average: Gradient | None = None
        self.inner_steps = 0
        self._reached: set[int] = set()  # the parameters that a term had a gradient for
        self._before: tuple[Any, ...] = ()  # see undo

    def take(self, model: nn.Module, batches: Batches, totals: Totals) -> Tensor:
        """Set the gradients for one step on these micro-batches; returns the loss."""
        weights = dict(self.loss.weights)
        gradients, values = {}, {}
        self._reached.clear()
        constraint = self.loss.constraint
        self._note_before()
        if constraint is not None:
            self.inner_steps = 0
            sizes = [
                0 if self.trainer.is_blank(batch) else len(batch["retain"]["input_ids"])
                for batch in batches
            ]
            constraint.prepare(partial(self._inner_step, model, sizes))
        if self.loss.retain is not None:
            gradients["retain"], values["retain"] = self._gradient(model, batches, totals, "retain")
        if constraint is not None:
            weights["retain"] = constraint.weight(values["retain"])
            self.trainer.note("multiplier", constraint.multiplier)
        if self.loss.forget is not None:
            gradients["forget"], values["forget"] = self._forget_gradient(model, batches, totals)
        if self.plugins.gru is not None:
            weight = self.plugins.gru.moving_avg
            self.retain_average = averaged(self.retain_average, gradients["retain"], weight)
            gradients["forget"] = rectified(gradients["forget"], self.retain_average)
        if constraint is not None and "forget" in values:
            epoch = float(self.trainer.state.epoch or 0.0)
            constraint.update(values["forget"], values["retain"], epoch)
        for i, parameter in enumerate(self._trained()):
            if i in self._reached:  # a guard looks for those that are not
                shares = [weights[name] * found[i] for name, found in gradients.items()]
                parameter.grad = torch.stack(shares).sum(0)
        for name, value in values.items():
            self.trainer.note(f"{name}_loss", value)
        total = sum(weights[name] * value for name, value in values.items())
        if self.trainer.penalty is not None:
            penalty = self.trainer.penalty(self.trainer.accelerator.unwrap_model(model))
            penalty.backward()
            total += float(penalty.detach())
        return torch.tensor(total, device=self.trainer.args.device)

    def _note_before(self) -> None:
        constraint = self.loss.constraint
        kept = constraints.state(constraint) if constraint is not None else {}
        moves = isinstance(constraint, AugmentedLagrangian)  # its inner steps move the weights
        weights = [p.detach().clone() for p in self._trained()] if moves else []
        self._before = kept, self.retain_average, weights

    def undo(self) -> None:
        """Weights and memory as they were before :meth:`take`; the gradients are to be dropped."""
        kept, self.retain_average, weights = self._before
        if self.loss.constraint is not None:
            constraints.restore(self.loss.constraint, kept)
        with torch.no_grad():
            for parameter, old in zip(self._trained(), weights, strict=False):
                parameter.copy_(old)

    def _forget_gradient(
        self, model: nn.Module, batches: Batches, totals: Totals
    ) -> tuple[Gradient, float]:
        row_weights = self._row_weights(model, batches)
        found = self._gradient(model, batches, totals, "forget", row_weights)
        if self.plugins.sam is None:
            return found
        with moved_by(self._trained(), found[0], self.plugins.sam.rho):
            return self._gradient(model, batches, totals, "forget", row_weights)

    def _gradient(
        self,
        model: nn.Module,
        batches: Batches,
        totals: Totals,
        term: str,
        row_weights: Sequence[Tensor] | None = None,
    ) -> tuple[Gradient, float]:
        """The gradient of one term over the effective batch of all processes, and its value."""
        trainer, parameters = self.trainer, self._trained()
        for parameter in parameters:
            parameter.grad = None
        value = 0.0
        for i, batch in enumerate(batches):
            weighted = None if row_weights is None else row_weights[i]
            # what DDP would average is summed below: each process holds its share of the loss
            with trainer.accelerator.no_sync(model):
                with trainer.compute_loss_context_manager():
                    loss = trainer.losses(
                        model, batch, totals, terms=(term,), row_weights=weighted
                    )[term]
                trainer.accelerator.backward(loss)
            value += float(loss.detach())
        self._reached |= {i for i, p in enumerate(parameters) if p.grad is not None}
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        found = [trainer.accelerator.reduce(gradient, "sum") for gradient in found]
        total = trainer.accelerator.reduce(torch.tensor(value, device=trainer.args.device), "sum")
        trainer.finite(term, value := float(total), batches, alike=True)
        return found, value

    @torch.no_grad()
    def _row_weights(self, model: nn.Module, batches: Batches) -> list[Tensor] | None:
        """BalDRO's weight of every forget row of the effective batch, for each micro-batch."""
        if self.plugins.dro is None:
            return None
        assert self.loss.forget is not None
        found = []
        for batch in batches:
            views = self.trainer.views(model, batch, ("forget",))
            losses = self.loss.forget(views, self.trainer.drawn)
            by_row = self.loss.by_row(losses, views, empty=-math.inf)
            blank = self.trainer.is_blank(batch)
            found.append(torch.full_like(by_row, -math.inf) if blank else by_row)
        accelerator, mine = self.trainer.accelerator, torch.cat(found)
        # the last step of an epoch may have fewer rows in some processes
        padded = accelerator.pad_across_processes(mine, pad_index=-math.inf)
        first = self.trainer.args.process_index * len(padded)
        weights = robust_weights(accelerator.gather(padded), self.plugins.dro)
        return list(weights[first : first + len(mine)].split([len(rows) for rows in found]))

    def _inner_step(self, model: nn.Module, sizes: Sequence[int], learning_rate: float) -> float:
        """One step of plain gradient descent on fresh retain rows; returns their loss before it."""
        trainer, rows = self.trainer, self.trainer.parts.rows["retain"]
        self.inner_steps += 1
        mine = torch.tensor([sum(sizes)], device=trainer.args.device)
        counts = trainer.accelerator.gather(mine).tolist()
        # all processes draw the same rows, and each takes its own of them
        draw = np.random.default_rng(
            [trainer.args.seed, 0, trainer.state.global_step, self.inner_steps]
        )
        drawn = draw.integers(len(rows), size=sum(counts))
        own = drawn[sum(counts[: trainer.args.process_index]) :][: sum(sizes)]
        # where there is no row for this process, a blank one takes part in the step
        numbers = [part.tolist() or [BLANK] for part in np.split(own, np.cumsum(sizes)[:-1])]
        batches = [
            trainer._prepare_inputs(
                {"retain": collate([replace(rows[i], number=i) for i in part], trainer.pad_id)}
            )
            for part in numbers
        ]
        totals = trainer.totals(batches, ("retain",))
        gradient, value = self._gradient(model, batches, totals, "retain")
        longest = trainer.args.max_grad_norm or math.inf
        length = max(float(inner(gradient, gradient).sqrt()), 1e-12)
        step = learning_rate * min(1.0, longest / length)
        with torch.no_grad():
            for parameter, slope in zip(self._trained(), gradient, strict=True):
                parameter.sub_(step * slope)
        return value

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.trainer.model.parameters() if p.requires_grad]
