"""Turn the unlearning adapter down or up."""

from typing import Any

from unlora.audits.attack import AdaptedModel, attack
from unlora.model.adapter_scale import scale_adapter
from unlora.registry import NotNegative


@attack("scale", of_adapters=True)
def scale(model: AdaptedModel, *, scale: NotNegative = 0.0) -> None:
    """Multiply what the last adapter adds; 0 is the model without it."""
    network: Any = model
    scale_adapter(network, network.active_adapters[-1], scale)
