"""Turn the unlearning adapter down or up."""

from peft.tuners.lora import LoraLayer
from torch import nn

from unlora.audits.attack import AdaptedModel, attack
from unlora.registry import NotNegative


@attack("scale", of_adapters=True)
def scale(model: AdaptedModel, *, scale: NotNegative = 0.0) -> None:
    """Multiply what the last adapter adds; 0 is the model without it."""
    network: nn.Module = model
    for layer in network.modules():
        if isinstance(layer, LoraLayer):
            last = max(layer.scaling, key=lambda name: int(name.removeprefix("link")), default=None)
            if last is not None:
                layer.scaling[last] *= scale
