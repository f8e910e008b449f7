"""Build the plug-ins that go with any objective: SAM, GRU, BalDRO, LoRA+, FILA, ReGLU, O3.

``trainer.plugins`` of a config names them, each with its settings; ``plugin=[SAM,BalDRO]`` chooses
them from ``configs/plugin``. Any two go together, but for two that start the adapter.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Literal

from unlora.errors import InputError
from unlora.registry import (
    AtLeastOne,
    Index,
    NotNegative,
    Positive,
    Share,
    UpToOne,
    check_settings,
    unknown,
)
from unlora.trainer.loss import SUBTRACTED, UnlearningLoss


@dataclass(frozen=True)
class SAM:
    """Sharpness-aware minimisation of the forget loss: its gradient where it is worst nearby.

    Fan et al. 2025, arXiv:2502.05374, for unlearning that withstands relearning. The forget
    gradient is taken at theta + rho * g / ||g||, g being the forget gradient at theta; the retain
    gradient stays that at theta. One more pass for each forget view.

    Attributes:
        rho: how far the weights are moved, as a Euclidean distance over all trained ones.
    """

    rho: Positive = 0.01


@dataclass(frozen=True)
class GRU:
    """Gradient rectified unlearning: the forget gradient without what would harm retention.

    Wang et al. 2025, arXiv:2503.09117. Where <g_f, g_r> < 0, g_f loses its component along g_r, all
    trained weights taken as one vector. The retain term keeps its own weight beside it; the paper
    adds it in some variants only (its ``alpha`` may be small here, but not 0).

    Attributes:
        moving_avg: weight of the newest gradient in the moving average that g_r is; 1 takes each
            step's own.
    """

    moving_avg: Share = 0.8


@dataclass(frozen=True)
class BalDRO:
    """Distributionally robust weights for the rows of the forget loss: the hardest count most.

    arXiv:2601.09172. ``DV`` (Donsker-Varadhan): beta log mean exp(loss / beta), whose gradient
    weighs row i by softmax(loss / beta)_i. ``G``: the mean of the hardest share. Both over the
    effective batch, and of a loss with one value per token over the rows' means. The authors' code
    has both signs of DV the other way round, so that rows already forgotten count most; here it is
    as the paper says.

    Attributes:
        variant: DV or G.
        beta: temperature in units of the loss, of DV.
        share: the share of rows that counts, of G.
    """

    variant: Literal["DV", "G"] = "DV"
    beta: Positive = 2.0
    share: Share = 0.5


@dataclass(frozen=True)
class LoRAPlus:
    """A higher learning rate for lora_B. Hayou et al. 2024, arXiv:2402.12354.

    Attributes:
        ratio: learning rate of lora_B over that of lora_A, which has the configured one.
    """

    ratio: Positive = 16.0


@dataclass(frozen=True)
class FILA:
    """Start the adapter at the part of the weights that matters for forget and not for retain data.

    LoKU, Cha et al. 2024, arXiv:2408.06621. See ``unlora.trainer.data_driven_init``.

    Attributes:
        num_rows: rows of each part from which the Fisher information is estimated.
    """

    num_rows: AtLeastOne = 256


@dataclass(frozen=True)
class ReGLU:
    """Start the adapter where forget data are and retain data are not, and keep it out of theirs.

    arXiv:2604.17396. See ``unlora.trainer.data_driven_init``.

    Attributes:
        beta: how much the retain data count against the forget data, between 0 and 1.
        num_rows: rows of each part from which the directions are estimated.
        orthogonal_rank: number of retain directions that lora_B is kept away from.
        orthogonal_weight: lambda, the weight of || B^T P_retain || ** 2 in the loss; 0 for none.
    """

    beta: UpToOne = 0.7
    num_rows: AtLeastOne = 256
    orthogonal_rank: Index = 128
    orthogonal_weight: NotNegative = 0.5


@dataclass(frozen=True)
class Orthogonal:
    """Keep the adapter orthogonal to those that earlier requests have left in the lineage.

    O3, Gao et al. 2024, arXiv:2407.10223. See ``unlora.trainer.orthogonal``.

    Attributes:
        weight: of sum_i || A_i A^T || ** 2 in the loss.
    """

    weight: Positive = 0.5


@dataclass(frozen=True)
class Plugins:
    """The plug-ins of one run, as far as there are some."""

    sam: SAM | None = None
    gru: GRU | None = None
    dro: BalDRO | None = None
    lora_plus: LoRAPlus | None = None
    start: FILA | ReGLU | None = None
    orthogonal: Orthogonal | None = None

    KINDS: ClassVar[Mapping[str, tuple[str, type]]] = {
        "SAM": ("sam", SAM),
        "GRU": ("gru", GRU),
        "BalDRO": ("dro", BalDRO),
        "LoRAPlus": ("lora_plus", LoRAPlus),
        "FILA": ("start", FILA),
        "ReGLU": ("start", ReGLU),
        "Orthogonal": ("orthogonal", Orthogonal),
    }

    @classmethod
    def build(
        cls, named: Mapping[str, Mapping[str, Any] | None], loss: UnlearningLoss, *, use_lora: bool
    ) -> "Plugins":
        """The plug-ins that ``trainer.plugins`` names.

        Raises:
            InputError: an unknown one or setting, two that exclude each other, or one that this
                loss or a training without LoRA leaves nothing to do.
        """
        chosen: dict[str, Any] = {}
        for name, settings in named.items():
            if name not in cls.KINDS:
                raise InputError(unknown("plug-in", name, cls.KINDS))
            slot, kind = cls.KINDS[name]
            if slot in chosen:
                other = type(chosen[slot]).__name__
                raise InputError(
                    f"The plug-ins {other} and {name} both say where the adapter starts, and it "
                    "can start in one place only. Choose one of them."
                )
            defaults = {f.name: f.default for f in fields(kind) if f.default is not MISSING}
            checked = check_settings(f"plug-in {name}", defaults, settings or {}, declared=kind)
            chosen[slot] = kind(**checked)
            if reason := _refused(name, chosen[slot], loss, use_lora):
                raise InputError(f"The plug-in {name} {reason}")
        return cls(**chosen)

    @property
    def compose_gradients(self) -> bool:
        """Whether a step needs the gradient of each term for itself."""
        return bool(self.sam or self.gru or self.dro)


def _refused(name: str, plugin: Any, loss: UnlearningLoss, use_lora: bool) -> str | None:
    """Why this plug-in cannot go with this loss, and what to do."""
    if isinstance(plugin, (LoRAPlus, FILA, ReGLU, Orthogonal)) and not use_lora:
        return "is about the adapter, but model.use_lora is false. Set model.use_lora=true."
    if isinstance(plugin, (LoRAPlus, Orthogonal)):
        return None
    if loss.forget is None:
        return "works on the forget loss, and there is none. Use it to unlearn."
    if isinstance(plugin, GRU) and loss.retain is None:
        return (
            "compares the forget gradient with the retain gradient, but there is none. Set "
            "trainer.method_args.retain_loss_type=NLL and an alpha above 0."
        )
    if isinstance(plugin, (SAM, GRU, BalDRO)) and loss.handler in SUBTRACTED:
        return (
            f"changes how data are forgotten, but {loss.handler} learns them, to subtract what it "
            "learnt. Leave one of them out."
        )
    if isinstance(plugin, (FILA, ReGLU)) and loss.handler in SUBTRACTED:
        return (
            f"starts the adapter from the weights, but {loss.handler} subtracts what a new adapter "
            "learns from nothing. Leave one of them out."
        )
    if isinstance(plugin, BalDRO) and loss.forget.unit == "batches":
        return (
            f"weighs the rows of the forget loss, and {loss.forget.name} has none: it is one "
            "number for a batch. Choose the variant without _upstream."
        )
    return None
