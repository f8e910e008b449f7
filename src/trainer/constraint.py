"""Adapt the weight of the retain term to a bound on the retain loss (PDU, BLADE).

Minimise the forget loss so that the retain loss stays below eps. A multiplier, the dual variable of
that bound, grows while the bound is broken and shrinks while there is room. It changes once per
optimiser step, by the retain loss over the whole effective batch, and is saved in checkpoints.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from unlora.errors import InputError
from unlora.registry import Index, NotNegative, check_settings

InnerStep = Callable[[float], float]  # learning rate -> the retain loss before that step


@dataclass
class PrimalDual:
    """gamma L_f + lambda (L_r - eps), lambda <- [lambda + eta (L_r - eps)]_+.

    PDU, Entesari et al. 2025, arXiv:2506.05314. lambda starts at ``alpha``. Open-Unlearning changes
    it with every micro-batch of every process; here a step's batch layout makes no difference.

    Attributes:
        retain_loss_eps: eps, in units of the retain loss.
        dual_step_size: eta.
        dual_warmup_epochs: lambda stays ``alpha`` until then.
        primal_dual: false keeps lambda at ``alpha``.
        dual_update_upon: Open-Unlearning's key; ``step`` is the only value.
        multiplier: lambda.
    """

    retain_loss_eps: NotNegative = 0.3
    dual_step_size: NotNegative = 5.0
    dual_warmup_epochs: NotNegative = 5.0
    primal_dual: bool = True
    dual_update_upon: str = "step"
    multiplier: float = field(init=False, default=0.0)
    converged: ClassVar[bool] = False  # it never ends a training by itself

    def __post_init__(self) -> None:
        if self.dual_update_upon != "step":
            raise InputError(
                f"dual_update_upon is {self.dual_update_upon!r}; lambda is updated with every "
                "optimiser step. Leave it out, or set it to step."
            )

    def prepare(self, inner_step: InnerStep) -> None:
        """Nothing comes before a step."""

    def weight(self, retain_loss: float) -> float:
        """What the retain gradient is multiplied with."""
        return self.multiplier

    def update(self, forget_loss: float, retain_loss: float, epoch: float) -> None:
        """Take note of one step's losses."""
        if self.primal_dual and epoch >= self.dual_warmup_epochs:
            moved = self.multiplier + self.dual_step_size * (retain_loss - self.retain_loss_eps)
            self.multiplier = max(0.0, moved)


@dataclass
class AugmentedLagrangian:
    """L_f + lambda r + rho / 2 max(0, r) ** 2 with r = L_r - eps; finds eps and its end by itself.

    BLADE, arXiv:2608.22557, from the authors' working code. Before every step come ``inner_steps``
    of plain gradient descent on fresh retain rows, and more of them while L_r is above 2 eps; eps
    is ``eps_factor`` times the retain loss in the first such round. After every step lambda <-
    lambda + rho r, by a tenth of that where r < 0, and never below 0.1. Training stops once the
    smoothed forget loss has at least halved and its speed is below 1 % of its highest (or the loss
    below 2 % of its first), for ``patience`` steps in a row.

    Differences: r is that of the effective batch, where the code has one for each micro-batch; the
    code's one-time change of the learning rate is left out; and a run that is never above 2 eps for
    three steps in a row may stop, too, where the code goes on to its last step. A round of extra
    steps stands for the next regular one, where the code runs both, and a retain loss above 10 does
    not end the run.

    Attributes:
        inner_steps: K. 0 takes eps from the first step's retain loss.
        inner_lr: their learning rate.
        eps_factor: 0.85 on TOFU, 1.3 to 3.2 elsewhere in the paper: above 1 where the target
            answers its retain data almost perfectly.
        rho: weight of the square, and step size of lambda.
        patience: see above.
        multiplier: lambda; starts at ``alpha``.
    """

    inner_steps: Index = 3
    inner_lr: NotNegative = 2e-4
    eps_factor: NotNegative = 0.85
    rho: NotNegative = 0.1
    patience: Index = 8
    multiplier: float = field(init=False, default=1.0)
    eps: float = field(init=False, default=math.nan)
    retain_loss: float = field(init=False, default=math.nan)
    steps: float = field(init=False, default=0)
    broken_in_a_row: float = field(init=False, default=0)
    hit_at: float = field(init=False, default=math.nan)
    first_loss: float = field(init=False, default=math.nan)
    smooth_loss: float = field(init=False, default=math.nan)
    speed: float = field(init=False, default=0.0)
    top_speed: float = field(init=False, default=0.0)
    still_for: float = field(init=False, default=0)

    SMOOTH = 0.15  # weight of the newest value in the averages
    SMALLEST, SHRINK = 0.1, 0.1  # of lambda, see above
    IN_A_ROW = 3  # steps with a broken bound after which it counts as hit

    @property
    def converged(self) -> bool:
        """Whether training should end."""
        return self.still_for >= self.patience

    def prepare(self, inner_step: InnerStep) -> None:
        """Learn retain data for a few steps; the first time, find eps."""
        for _ in range(1 + 3 * self._far_off()):
            inner_losses = [inner_step(self.inner_lr) for _ in range(self.inner_steps)]
            if inner_losses and math.isnan(self.eps):
                self.eps = self.eps_factor * sum(inner_losses) / len(inner_losses)
            self.retain_loss = inner_losses[-1] if inner_losses else self.retain_loss
            if not self._far_off():
                break
        if self.steps:
            self.broken_in_a_row = self.broken_in_a_row + 1 if self._far_off() else 0
            if self.broken_in_a_row == self.IN_A_ROW and math.isnan(self.hit_at):
                self.hit_at = self.steps - self.IN_A_ROW + 1

    def weight(self, retain_loss: float) -> float:
        """What the retain gradient is multiplied with: d/dL_r of the Lagrangian."""
        if math.isnan(self.eps):
            self.eps = self.eps_factor * retain_loss
        return self.multiplier + self.rho * max(0.0, retain_loss - self.eps)

    def update(self, forget_loss: float, retain_loss: float, epoch: float) -> None:
        """Take note of one step's losses."""
        excess = retain_loss - self.eps
        step = self.rho * excess * (1 if excess > 0 else self.SHRINK)
        self.multiplier = max(self.SMALLEST, self.multiplier + step)
        self.retain_loss, self.steps = retain_loss, self.steps + 1
        if math.isnan(self.first_loss):
            self.first_loss = self.smooth_loss = forget_loss
        before = self.smooth_loss
        self.smooth_loss += self.SMOOTH * (forget_loss - before)
        self.speed += self.SMOOTH * (self.smooth_loss - before - self.speed)
        self.top_speed = max(self.top_speed, abs(self.speed))
        self.still_for = self.still_for + 1 if self._still() else 0

    def _far_off(self) -> bool:
        return self.retain_loss > 2 * self.eps

    def _still(self) -> bool:
        late = math.isnan(self.hit_at) or self.steps >= 1.6 * self.hit_at
        slow = abs(self.speed) < 0.01 * self.top_speed
        done = self.smooth_loss < 0.02 * self.first_loss
        return late and self.smooth_loss <= 0.5 * self.first_loss and (slow or done)


Constraint = PrimalDual | AugmentedLagrangian
CONSTRAINTS: Mapping[str, type[PrimalDual] | type[AugmentedLagrangian]] = {
    "PDU": PrimalDual,
    "PDU_upstream": PrimalDual,
    "BLADE": AugmentedLagrangian,
}


def settings_of(kind: type[Constraint]) -> dict[str, object]:
    """What a config may set, and the defaults."""
    return {f.name: f.default for f in fields(kind) if f.init}


def build(handler: str, values: Mapping[str, object], alpha: float) -> Constraint:
    """The constraint of this handler; its multiplier starts at ``alpha``.

    Raises:
        InputError: a setting of the wrong type or out of range.
    """
    kind: Any = CONSTRAINTS[handler]
    settings = check_settings(handler, settings_of(kind), values, declared=kind)
    constraint: Constraint = kind(**settings)
    constraint.multiplier = float(alpha)
    return constraint


def state(constraint: Constraint) -> dict[str, float]:
    """Everything that changes while it works."""
    return {f.name: float(getattr(constraint, f.name)) for f in fields(constraint) if not f.init}


def restore(constraint: Constraint, saved: Mapping[str, float]) -> None:
    """Put back what :func:`state` gave."""
    for name, value in saved.items():
        setattr(constraint, name, value)
